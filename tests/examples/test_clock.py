"""The clock stops training early enough for what comes after it."""

from __future__ import annotations

import pytest

from gpt.clock import SAFETY, WRITING_S, Clock


class Watch:
    """A time that only the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def watch() -> Watch:
    return Watch()


def make_clock(watch: Watch, *, limit_s: float = 1000.0) -> Clock:
    return Clock(started=watch(), limit_s=limit_s, now=watch)


def test_pauses_are_not_training(watch: Watch) -> None:
    clock = make_clock(watch)
    watch.seconds += 3
    assert clock.end_window() == pytest.approx(3)
    with clock.paused():
        watch.seconds += 50
    watch.seconds += 4
    assert clock.end_window() == pytest.approx(4)
    assert clock.training_s == pytest.approx(7)
    assert clock.elapsed_s == pytest.approx(57)


def test_it_leaves_time_for_a_window_an_evaluation_and_what_was_rehearsed(watch: Watch) -> None:
    clock = make_clock(watch)
    with clock.rehearsed():
        watch.seconds += 10
    with clock.paused():
        watch.seconds += 20
    watch.seconds += 30
    clock.end_window()
    last_moment = 100 + 1000 - SAFETY * (10 + 20 + 30) - WRITING_S
    watch.seconds = last_moment - 0.1
    assert not clock.must_stop()
    watch.seconds = last_moment + 0.1
    assert clock.must_stop()
