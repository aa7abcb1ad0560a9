"""Units that stay whole until the step: the same bits, fewer gathers, and edits that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import (
    PRECISIONS,
    assert_same,
    make_gpt,
    my_pieces,
    sgd,
    token_batches,
    train_on,
    whole_masters,
    whole_weights,
    zero_config,
)
from plain import world_size
from unusual import CASES, config_for as unusual_config_for, inputs, train_sharded
from zerolith.member import Member
from zerolith.parameter import ShardedParameter
from zerolith.unit import Phase
from zerolith.wrap import UnitPlan, living

DATA = token_batches(5, 8)
SOME, ALL = 20_000, 10**9  # elements; a block of the GPT has 12,704


def start(live: int, *, stage: int = 3, steps: int = 2, **more: Any) -> Any:
    zero = {"stage3_max_live_parameters": live, "reduce_bucket_size": 4000}
    sizes = {"train_micro_batch_size_per_gpu": 8 // world_size() // steps, "gradient_accumulation_steps": steps}
    config = zero_config(stage, zero_optimization=zero, gradient_clipping=0.5, **sizes, **more)
    return zerolith.initialize(model=make_gpt(), config=config)[0]


def num_whole(engine: Any) -> int:
    return sum(unit.phase is Phase.GATHERED for unit in engine._sharded.units)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_how_many_units_live_changes_no_bit(precision: str) -> None:
    def body(live: int) -> Any:
        engine = start(live, **PRECISIONS[precision])
        losses = train_on(engine, DATA)
        return losses, whole_weights(engine), whole_masters(engine)

    for world in (1, 2):
        none = run_ranks(world, body, 0)
        assert_same(run_ranks(world, body, SOME), none)
        assert_same(run_ranks(world, body, ALL), none)


@pytest.mark.parametrize("name", CASES)
def test_unusual_modules(name: str) -> None:
    def body(live: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = unusual_config_for(3, zero_optimization={"stage3_max_live_parameters": live})
        return train_sharded(CASES[name](), sgd, inputs(2), config)

    assert_same(run_ranks(2, body, ALL), run_ranks(2, body, 0))


@pytest.mark.parametrize("live", [0, SOME, ALL])
def test_bytes_sent_are_those_planned(live: int) -> None:
    def body() -> tuple[dict[str, int], dict[str, int]]:
        engine = start(live)
        train_on(engine, DATA[:1])
        traffic = engine._sharded.comm.traffic
        traffic.clear()
        train_on(engine, DATA[1:2])
        return engine.summary().wire_bytes_per_step, {op: traffic.sent[op] for op in ("all_gather", "reduce_scatter")}

    for planned, sent in run_ranks(2, body):
        assert planned == sent


def test_they_are_whole_from_their_first_use_to_the_step() -> None:
    def body() -> None:
        engine = start(ALL)
        every = len(engine._sharded.units)
        for batch in DATA[:3]:
            assert num_whole(engine) == 0
            for piece in batch.view(2, -1, batch.shape[-1]):
                engine.backward(engine(piece[: 8 // engine.world_size // 2]))
                assert num_whole(engine) == every
                engine.step()
        with torch.no_grad():
            engine(DATA[0][:2])
        assert num_whole(engine) == 0, "after an evaluation one rank alone may look at the model"
        engine.backward(engine(DATA[0][:2]))
        engine.reset()
        assert num_whole(engine) == 0
        assert all(isinstance(param, ShardedParameter) for param in engine.module.parameters())

    run_ranks(2, body)


@pytest.mark.parametrize("looks", [False, True])
def test_what_is_written_to_them_in_between_is_kept(looks: bool) -> None:
    """As it is where parameters rest whole; also if someone looks at a neighbour meanwhile, or at the parameter."""

    def body(stage: int) -> Any:
        engine = start(ALL, stage=stage)
        train_on(engine, DATA[:2])
        block = engine.module.blocks[1]
        first, second = my_pieces(DATA[2], engine)
        engine.backward(engine(first))
        with torch.no_grad():
            block.up.weight.mul_(2.0)  # whole now, at every stage
        with zerolith.zero.GatheredParameters([block.up.bias, block.up.weight] if looks else []):
            pass
        engine.backward(engine(second))
        engine.step()
        train_on(engine, DATA[3:])
        return whole_weights(engine)

    assert_same(run_ranks(2, body, 3), run_ranks(2, body, 2))


def test_a_skipped_step_leaves_the_weights_and_goes_on() -> None:
    def body(live: int) -> Any:
        engine = start(live, bf16={"enabled": True})
        train_on(engine, DATA[:2])
        loss = engine(DATA[2][: 8 // engine.world_size // 2])
        engine.backward(loss * float("nan"))
        engine.backward(engine(DATA[2][: 8 // engine.world_size // 2]))
        engine.step()
        assert engine.skipped_steps == 1
        return train_on(engine, DATA[3:]), whole_weights(engine)

    assert_same(run_ranks(2, body, ALL), run_ranks(2, body, 0))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_those_that_live_are_as_many_as_fit(sizes: list[int], most: int) -> None:
    def plan(size: int) -> UnitPlan:
        member = Member(name="", param=nn.Parameter(torch.empty(size, device="meta")))
        return UnitPlan(name="", module=nn.Identity(), members=[member])

    plans = [plan(size) for size in sizes]
    lives = living(plans, max_numel=most)
    used = sum(size for size, each in zip(sizes, plans, strict=True) if each in lives)
    assert used <= most
    left = [size for size, each in zip(sizes, plans, strict=True) if each not in lives]
    assert all(size > most - used for size in left), "another one fits"
