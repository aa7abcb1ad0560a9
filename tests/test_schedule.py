"""Orders are learned, followed and met again; what ranks must do alike goes in one order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from zerolith.schedule import Order, Sequencer


def predictions(order: Order, visits: list[int]) -> list[int | None]:
    order.restart()
    return [order.visit(unit) for unit in visits]


def test_the_first_pass_predicts_nothing_and_the_second_everything() -> None:
    order = Order()
    assert predictions(order, [0, 1, 2]) == [None, None, None]
    assert predictions(order, [0, 1, 2]) == [1, 2, None]
    order.restart()
    assert str(order) == "0 -> 1 -> 2"


@pytest.mark.parametrize(
    ("known", "visits", "expected"),
    [
        ([0, 1, 2, 3], [0, 2, 3], [1, 3, None]),  # one is skipped
        ([0, 1, 2], [0, 7, 1, 2], [1, None, 2, None]),  # a stranger comes between
        ([0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, None]),  # units that are used twice
        ([0, 1, 2], [2, 1, 0], [None, None, None]),  # the other way round
    ],
)
def test_a_pass_that_differs_is_followed_where_it_meets_the_known_one(
    known: list[int], visits: list[int], expected: list[int | None]
) -> None:
    order = Order()
    predictions(order, known)
    assert predictions(order, visits) == expected
    assert predictions(order, visits)[:-1] == visits[1:], "the last pass is the prediction for the next"


def test_a_unit_that_is_used_again_at_once_counts_once() -> None:
    order = Order()
    predictions(order, [0, 1, 1, 2])
    assert predictions(order, [0, 1, 1, 1, 2]) == [1, 2, 2, 2, None]


def test_a_pass_without_visits_leaves_what_is_known() -> None:
    order = Order()
    predictions(order, [0, 1])
    predictions(order, [])
    assert predictions(order, [0, 1]) == [1, None]


@pytest.mark.parametrize(
    ("known", "visits", "last"),
    [
        ([0, 1, 2], [0, 1, 2], [False, False, True]),
        ([0, 1, 0, 1], [0, 1, 0, 1], [False, False, False, True]),  # used once more: not yet
        ([0, 1, 2], [0, 2, 1], [False, True, False]),
        ([], [0, 1], [False, False]),
    ],
)
def test_the_end_of_a_pass_is_known_when_it_comes(known: list[int], visits: list[int], last: list[bool]) -> None:
    order = Order()
    predictions(order, known)
    order.restart()
    ends = []
    for unit in visits:
        order.visit(unit)
        ends.append(order.ends_with(unit))
    assert ends == last


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(0, 6))
def test_whatever_becomes_ready_first_goes_in_the_fixed_order(
    order: list[int], arrival: list[int], num_arriving: int
) -> None:
    sequencer = Sequencer(6)
    sequencer.follow(order)
    for _ in range(2):
        sequencer.restart()
        gone: list[int] = []
        for item in arrival[:num_arriving]:
            gone += sequencer.ready(item)
            gone += sequencer.ready(item)
            assert set(gone) <= set(arrival[:num_arriving])
        gone += sequencer.rest()
        assert gone == order
        assert sequencer.rest() == []


def test_an_order_that_was_observed_lets_everything_go_at_once() -> None:
    sequencer = Sequencer(4)
    assert [sequencer.ready(item) for item in (2, 0, 3)] == [[], [0], []]
    assert sequencer.observed() == [2, 0, 3, 1]
    sequencer.follow(sequencer.observed())
    sequencer.restart()
    assert [sequencer.ready(item) for item in (2, 0, 3)] == [[2], [0], [3]]
    assert sequencer.rest() == [1]
