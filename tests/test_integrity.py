"""Bits that change by themselves are found, and named by rank and tensor; edits are no damage."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import zerolith
from harness import run_ranks
from models import make_gpt, token_batches, zero_config
from plain import STAGES, world_size
from zerolith.errors import IntegrityError
from zerolith.zero import safe_set_full_fp32_param

DATA = token_batches(4, 12)


def start(stage: int, **more: Any) -> Any:
    config = zero_config(stage, train_micro_batch_size_per_gpu=12 // world_size(), integrity_interval=2, **more)
    return zerolith.initialize(model=make_gpt(), config=config)[0]


def train(engine: Any, steps: int) -> None:
    for batch in DATA[:steps]:
        engine.backward(engine(batch.chunk(world_size())[engine.global_rank]))
        engine.step()


def flip(tensor: Tensor) -> None:
    """A bit of the first byte, behind torch's back."""
    byte = ctypes.c_ubyte.from_address(tensor.data_ptr())
    byte.value ^= 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_a_healthy_run_passes(stage: int, precision: dict[str, Any]) -> None:
    def body() -> None:
        engine = start(stage, **precision)
        train(engine, 4)
        safe_set_full_fp32_param(next(engine.module.parameters()), torch.ones(64, 32))  # an edit is no damage
        with zerolith.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            if engine.global_rank == 0:
                engine.module.norm.weight.data.mul_(2)
        train(engine, 4)

    run_ranks(2, body)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_replica_that_differs_is_named_with_its_rank(stage: int) -> None:
    def body() -> str:
        engine = start(stage)
        train(engine, 1)
        if engine.global_rank == 1:
            flip(engine.module.blocks[1].up.weight)
        with pytest.raises(IntegrityError) as caught:
            train(engine, 1)
        return str(caught.value)

    for text in run_ranks(3, body):
        assert re.search(r"before step 2 .* rank 1: weights of blocks\.1\.up\.weight", text), text
        assert not re.search("rank [02]: [^f]", text), text


def test_of_two_ranks_nobody_knows_which_is_right() -> None:
    def body() -> str:
        engine = start(1)
        train(engine, 1)
        if engine.global_rank == 1:
            engine.optimizer.param_groups[0]["lr"] = 1.0
        with pytest.raises(IntegrityError) as caught:
            train(engine, 1)
        return str(caught.value)

    for text in run_ranks(2, body):
        assert "rank 0: learning rates, loss scale or counters; rank 1: learning rates" in text


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["state", "master"])
def test_a_flipped_bit_in_a_shard_at_rest_is_found_before_the_next_step_uses_it(stage: int, what: str) -> None:
    def body() -> str:
        engine = start(stage, bf16={"enabled": True})
        train(engine, 2)
        if engine.global_rank == 1:
            section = engine._sharded.sections[-1]
            param = engine.basic_optimizer.param_groups[0]["params"][0]
            flip(section.main.data if what == "master" else engine.basic_optimizer.state[param]["exp_avg"])
        with pytest.raises(IntegrityError) as caught:
            train(engine, 1)
        return str(caught.value)

    for text in run_ranks(2, body):
        assert re.search(r"rank 1: the bits of (master|exp_avg) of \S+.* changed in memory after step 2", text), text


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = zerolith.initialize(model=make_gpt(), config=zero_config(1, train_micro_batch_size_per_gpu=12))[0]
    monkeypatch.setattr("zerolith.integrity.digest", lambda tensor: pytest.fail("hashed though nobody asked"))
    train(engine, 2)
