"""Ranks with different amounts of work: nothing hangs, and the numbers are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from plain import MICRO, STAGES, Batch, config_for, loss_of, make_batches, make_mlp, start, train_engine
from zerolith.errors import UsageError

EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)
SGD = {"type": "SGD", "params": {"lr": 0.05}}
COUNTS = (4, 1, 3)  # batches of each rank
TIME_OUT = 60.0


def batches_of(rank: int) -> list[Batch]:
    return make_batches(COUNTS[rank], MICRO, seed=10 + rank)


def joined_weights() -> dict[str, Tensor]:
    """Plain PyTorch: at each step the mean over the batches that there are."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = [batches_of(rank) for rank in range(3)]
    for step in range(max(COUNTS)):
        there = [batches[step] for batches in data if step < len(batches)]
        (sum(loss_of(model, batch) for batch in there) / len(there)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@EVERY_STAGE
def test_ranks_that_run_out_take_part_and_the_mean_is_over_the_others(stage: int) -> None:
    def body() -> tuple[int, dict[str, Tensor]]:
        engine = start(config_for(stage, optimizer=SGD))
        seen = 0
        for batch in engine.join(batches_of(engine.global_rank)):
            engine.backward(loss_of(engine, batch))
            engine.step()
            seen += 1
        return seen, train_engine(engine, []).weights

    expected = joined_weights()
    for seen, weights in run_ranks(3, body, timeout_s=TIME_OUT):
        assert seen == max(COUNTS)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


def test_leaving_a_join_early_leaves_no_trace() -> None:
    def body() -> float:
        engine = start(config_for(1, optimizer=SGD))
        for batch in engine.join(batches_of(engine.global_rank)):
            engine.backward(loss_of(engine, batch))
            engine.step()
            if engine.global_steps == 2:
                break
        return engine._weight

    assert run_ranks(3, body, timeout_s=TIME_OUT) == [1.0] * 3


def test_a_rank_without_any_batch_is_an_error_everywhere() -> None:
    def body() -> None:
        engine = start(config_for(2, optimizer=SGD))
        with pytest.raises(UsageError, match="no batch at all"):
            next(iter(engine.join(batches_of(0) if engine.global_rank else [])))

    run_ranks(2, body, timeout_s=TIME_OUT)


@EVERY_STAGE
def test_evaluation_between_steps_changes_nothing(stage: int) -> None:
    data = token_batches(3, 8)

    def body(evaluates: bool) -> list[float]:
        engine = start_engine(make_gpt(), zero_config(stage))
        losses = []
        for batch in data:
            mine = batch.chunk(2)[engine.global_rank]
            loss = engine(mine)
            engine.backward(loss)
            if evaluates:
                engine.eval()
                with torch.no_grad():
                    engine(mine)
                engine.module(mine)  # with a graph that nobody uses
                engine.train()
            engine.step()
            losses.append(loss.item())
        engine.destroy()
        return losses

    for with_it, without in zip(
        run_ranks(2, body, True, timeout_s=TIME_OUT), run_ranks(2, body, False, timeout_s=TIME_OUT), strict=True
    ):
        assert with_it == without


def test_generation_at_stage_3_may_stop_at_different_lengths() -> None:
    """Inside GatheredParameters forwards communicate nothing, so each rank runs as many as it likes."""

    def body() -> tuple[int, int, list[float]]:
        torch.manual_seed(0)
        engine = start_engine(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), zero_config(3))
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(engine.global_rank))
        calls = engine._sharded.comm.traffic.calls
        with torch.no_grad(), zerolith.zero.GatheredParameters(list(engine.module.parameters())):
            before = calls["all_gather"]
            for _ in range(2 + 3 * engine.global_rank):
                x = engine.module(x)
            sent = calls["all_gather"] - before
        losses = []
        for _ in range(2):
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return sent, engine.global_steps, losses

    for sent, steps, losses in run_ranks(2, body, timeout_s=TIME_OUT):
        assert (sent, steps) == (0, 2)
        assert losses[1] < losses[0]


class Experts(nn.Module):
    """Every rank uses one of them, and a head only now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.extra = nn.Linear(16, 16)
        self.rank = 0

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.experts[(self.rank + step) % 3](x)
        if self.rank == 1 and step % 2:
            x = self.extra(x)
        return x.square().mean()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = Experts()

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.moe(x, step)


def plain_mixture() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Mixture()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        losses = []
        for rank in range(2):
            model.moe.rank = rank
            losses.append(model(inputs(rank), step))
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def inputs(rank: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))


@EVERY_STAGE
def test_modules_that_some_ranks_do_not_reach_hang_nobody(stage: int) -> None:
    expected = plain_mixture()

    def body() -> dict[str, Tensor]:
        torch.manual_seed(0)
        leaf: dict[str, Any] = {"leaf_module": {"classes": ["Experts"]}, "stage3_param_persistence_threshold": 1}
        optimizer = {"type": "SGD", "params": {"lr": 0.5}}
        engine = start_engine(Mixture(), zero_config(stage, optimizer=optimizer, zero_optimization=leaf))
        engine.module.moe.rank = engine.global_rank
        for step in range(4):
            engine.backward(engine(inputs(engine.global_rank), step))
            engine.step()
        with zerolith.zero.GatheredParameters(list(engine.module.parameters())):
            return {name: param.detach().clone() for name, param in engine.module.named_parameters()}

    for weights in run_ranks(2, body, timeout_s=TIME_OUT):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
