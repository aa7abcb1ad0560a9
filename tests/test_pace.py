"""How far shards are read ahead follows what reads and uses take, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import zerolith
import zerolith.hooks
import zerolith.placement
from harness import run_ranks
from models import assert_same, whole_weights, zero_config
from plain import world_size
from zerolith.memory import SwapFile
from zerolith.pace import FIRST, MOST, Pace, units_ahead
from zerolith.zero import GatheredParameters

TIMES = st.integers(0, 10**10)  # nanoseconds
SECONDS = st.floats(0, allow_nan=False)


@given(read=TIMES, between=TIMES.filter(bool))
def test_reads_of_so_many_units_cover_one_read(read: int, between: int) -> None:
    assert units_ahead(read, between) == min(max(ceil(Fraction(read, between)) + 1, 1), MOST)


@given(read=SECONDS, longer=SECONDS, between=SECONDS, wider=SECONDS)
def test_slower_reads_never_mean_fewer_and_slower_uses_never_more(
    read: float, longer: float, between: float, wider: float
) -> None:
    read, longer, between, wider = *sorted([read, longer]), *sorted([between, wider])
    assert 1 <= units_ahead(read, wider) <= units_ahead(read, between) <= units_ahead(longer, between) <= MOST


class Clock:
    """It is as late as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_pass(pace: Pace, clock: Clock, *, reads: list[float | None], between: float) -> int:
    for read_s in reads:
        with pace.waiting():
            clock.now += 100  # for the read
        pace.use(read_s=read_s)
        clock.now += between / 2
        with pace.waiting():  # of a unit that is there already
            clock.now += 7
        clock.now += between / 2
    pace.restart()
    return pace.ahead


def test_the_last_pass_decides() -> None:
    pace = Pace(clock=(clock := Clock()))
    assert pace.ahead == FIRST == 3
    assert run_pass(pace, clock, reads=[4.0] * 5, between=1) == 5
    assert run_pass(pace, clock, reads=[0.5] * 5, between=1) == 2
    assert run_pass(pace, clock, reads=[0.5, 0.5, 50, 0.5], between=1) == 2, "one that is late does not"
    assert run_pass(pace, clock, reads=[100.0] * 5, between=1) == MOST
    assert run_pass(pace, clock, reads=[0.0] * 5, between=1) == 1


@pytest.mark.parametrize("reads", [[], [None] * 5, [2.0]], ids=["none", "nobody knows", "one use"])
def test_what_is_not_known_changes_nothing(reads: list[float | None]) -> None:
    pace = Pace(clock=(clock := Clock()))
    assert run_pass(pace, clock, reads=[4.0] * 5, between=1) == 5
    assert run_pass(pace, clock, reads=reads, between=1) == 5


# --- in an engine -------------------------------------------------------------------------------

DEPTH, WIDTH = 24, 32


class Deep(nn.Module):
    """Many blocks of one size, each of which takes a second."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)])
        self.clock = clock
        self.watch: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            self.clock.now += 1
            self.watch()
        return x.square().mean()


class Slow(SwapFile):
    """Reads say that they take so many seconds."""

    read_s: float | None = 0.5

    def read(self, region: Any, storage: torch.UntypedStorage) -> Any:
        transfer = super().read(region, storage)
        wait = transfer.wait

        def say() -> None:
            wait()
            transfer.seconds = self.read_s

        transfer.wait = say
        return transfer


def start(store: SwapFile | None, clock: Clock, **more: Any) -> Any:
    config = zero_config(3, train_micro_batch_size_per_gpu=4 // world_size(), **more)
    config["zero_optimization"].update(reduce_bucket_size=WIDTH * WIDTH, stage3_param_persistence_threshold=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zerolith.placement, "_weights_store", lambda *_: store)
        patch.setattr(zerolith.hooks, "Pace", partial(Pace, clock=clock))
        return zerolith.initialize(model=Deep(clock), config=config)[0]


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = engine(torch.randn(4, WIDTH).chunk(engine.world_size)[engine.global_rank])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def near(engine: Any) -> int:
    """Blocks whose shards have memory."""
    return sum(any(each.weights.data.untyped_storage().nbytes() for each in unit.sections if each.is_sharded)
               for unit in engine._sharded.units)  # fmt: skip


def test_more_is_read_ahead_where_reads_are_slow_and_never_more_than_eight(tmp_path: Path) -> None:
    store, clock, seen = Slow(tmp_path), Clock(), []
    engine = start(store, clock)
    gatherer = engine._sharded.gatherer
    pace = gatherer._paces[gatherer._forward_order]
    engine.module.watch = lambda: seen.append(near(engine))
    most = {}
    for read_s, ahead in ((0.5, 2), (3.5, 5), (1000.0, MOST), (0.5, 2), (None, 2)):
        store.read_s = read_s
        train(engine, 2)  # one that shows, and one that follows
        seen.clear()
        with torch.no_grad():
            engine(torch.randn(4, WIDTH))
        assert pace.ahead == ahead
        most[ahead] = max(seen)
    assert most == {ahead: ahead for ahead in most}, "the one in use has let its shards go"
    engine.destroy()


def test_units_that_are_whole_already_say_nothing(tmp_path: Path) -> None:
    store, clock = Slow(tmp_path), Clock()
    engine = start(store, clock)
    train(engine, 2)
    store.read_s = 1000.0
    with torch.no_grad():
        with GatheredParameters(list(engine.module.parameters())):
            engine(torch.randn(4, WIDTH))
        engine(torch.randn(4, WIDTH))  # at its start, the last pass decides
        gatherer = engine._sharded.gatherer
        pace = gatherer._paces[gatherer._forward_order]
        assert pace.ahead == 2
        engine(torch.randn(4, WIDTH))
        assert pace.ahead == MOST
    engine.destroy()


def test_ranks_may_differ_in_how_far_and_no_bit_changes(tmp_path: Path) -> None:
    def body(read_s: float | None) -> Any:
        store, clock = None, Clock()
        if read_s is not None:
            store = Slow(tmp_path)
            store.read_s = read_s if torch.distributed.get_rank() else 0.5
        engine = start(store, clock, gradient_clipping=0.5)
        losses = train(engine, 4)
        ahead = sorted(pace.ahead for pace in engine._sharded.gatherer._paces.values())
        weights = whole_weights(engine)
        engine.destroy()
        return (losses, weights), ahead

    plain, offloaded = run_ranks(2, body, None), run_ranks(2, body, 1000.0)
    assert_same([result for result, _ in offloaded], [result for result, _ in plain])
    assert [ahead[-1] for _, ahead in offloaded] != [FIRST] * 2
    assert offloaded[0][1] != offloaded[1][1]
