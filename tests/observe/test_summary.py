"""The start-up summary counts what is there and is short however deep the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from zerolith.observe import Summary


def summary_of(stage: int, half: bool) -> tuple[Summary, int]:
    torch.manual_seed(0)
    model = make_gpt()
    numel = sum(param.numel() for param in model.parameters())
    engine = start_engine(model, zero_config(stage, bf16={"enabled": half}))
    return engine.summary(), numel


def test_bytes_at_rest_are_those_of_the_theory_and_little_padding() -> None:
    per_parameter = {  # weights, summed gradients, optimizer: over 2 ranks, by (stage, half precision)
        (0, False): (4, 4, 8),
        (1, False): (4, 2, 4),
        (3, False): (2, 2, 4),
        (0, True): (2, 4, 12),
        (2, True): (2, 2, 6),
        (3, True): (1, 2, 6),
    }
    for (stage, half), expected in per_parameter.items():
        summary, numel = run_ranks(2, summary_of, stage, half)[1]
        for (kind, count), each in zip(summary.bytes_per_rank.items(), expected, strict=True):
            assert each * numel <= count <= 1.15 * each * numel, (stage, half, kind)


def optimizer_bytes(kind: str, world_stage: int) -> tuple[int, int, int]:
    """Planned, and what the optimizer's states and masters take after a step; bytes of this rank's shards."""
    torch.manual_seed(0)
    engine = start_engine(make_gpt(), zero_config(world_stage, optimizer={"type": kind, "params": {"lr": 1e-3}}))
    engine.backward(engine(token_batches(1, 8)[0].chunk(engine.world_size)[engine.global_rank]))
    engine.step()
    states = engine.optimizer.state.values()
    held = sum(value.nbytes for state in states for value in state.values() if value.ndim)
    masters = sum(
        sum(master.nbytes for master in section.masters.values())
        if section.main is None
        else 0
        if section.main.shares_memory_with(section.weights)
        else section.main.data.nbytes
        for section in engine._sharded.sections
    )
    shard = sum(section.layout.shard_numel * 4 for section in engine._sharded.sections)
    return engine.summary().bytes_per_rank["optimizer"], held + masters, shard


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Lion", "Lamb", "Muon"])
def test_optimizer_bytes_are_those_of_its_states(kind: str) -> None:
    for planned, held, shard in run_ranks(2, optimizer_bytes, kind, 2):
        if kind == "SGD":  # counted as with momentum, which comes at the first step
            assert (planned, held) == (shard, 0)
        else:
            assert planned == pytest.approx(held, rel=0.1)


def test_the_text_names_ranks_and_units_and_folds_equal_blocks() -> None:
    text = str(run_ranks(2, summary_of, 3, False)[0][0])
    assert "on 2 ranks (gloo, cpu)" in text
    assert "root" in text
    assert "alike)" in text
    assert "sent per rank and step: all_gather" in text


def test_neighbours_fold_only_where_they_are_of_one_list_and_size() -> None:
    units = tuple((name, 1, size) for name, size in [("root", 9), ("a.0", 4), ("a.1", 4), ("a.2", 5), ("b.0", 4)])
    lines = str(Summary(headline="", units=units, bytes_per_rank={}, wire_bytes_per_step={})).splitlines()
    assert [line.split("  ")[1] for line in lines if line.startswith("  ")][1:6] == [
        "root", "a.* (2 alike)", "a.2", "b.0", "bytes per rank at rest: ",
    ]  # fmt: skip


def test_one_rank_sends_nothing_and_a_frozen_model_keeps_no_gradients() -> None:
    model = nn.Linear(4, 4)
    model.requires_grad_(False)
    summary = start_engine(model, zero_config(0, optimizer=None)).summary()
    assert sum(summary.wire_bytes_per_step.values()) == 0
    assert summary.bytes_per_rank["gradients"] == summary.bytes_per_rank["optimizer"] == 0
    assert summary.bytes_per_rank["parameters"] >= 80
