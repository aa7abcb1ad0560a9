"""Turn order is fair."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from benchmarks.interleave import turn_order

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("round_index", range(12))
def test_everyone_has_one_turn_in_every_round(count: int, round_index: int) -> None:
    engines = ENGINES[:count]
    assert sorted(turn_order(engines, round_index)) == sorted(engines)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("lap", range(3))
def test_over_a_lap_everyone_has_every_position_once(count: int, lap: int) -> None:
    engines = ENGINES[:count]
    rounds = [turn_order(engines, lap * count + index) for index in range(count)]
    for engine in engines:
        assert sorted(order.index(engine) for order in rounds) == list(range(count))


@pytest.mark.parametrize("count", range(2, 6))
def test_over_two_laps_each_follows_the_other_equally_often(count: int) -> None:
    engines = ENGINES[:count]
    follows = Counter(pair for index in range(2 * count) for pair in pairwise(turn_order(engines, index)))
    assert all(follows[first, second] == follows[second, first] for first, second in follows)


def test_two_engines_alternate() -> None:
    assert [turn_order(["a", "b"], index) for index in range(4)] == [
        ["a", "b"],
        ["b", "a"],
        ["b", "a"],
        ["a", "b"],
    ]
