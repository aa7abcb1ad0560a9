"""The loss scale as a sequence: growth after a window of good steps, hysteresis, the minimum."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from zerolith.errors import ScaleError
from zerolith.precision import LossScaler


def scales(scaler: LossScaler, steps: str) -> list[float]:
    """The scale after each step; "o" is an overflow, "." a good step."""
    found = []
    for step in steps:
        scaler.update(overflow=step == "o")
        found.append(scaler.scale)
    return found


SEQUENCES = [
    ("the window is counted in good steps", {"window": 3}, "......", [16, 16, 32, 32, 32, 64]),
    ("an overflow starts the window again", {"window": 2, "hysteresis": 1}, ".o..o.", [16, 8, 8, 16, 8, 8]),
    ("hysteresis forgives the first overflow", {"window": 9, "hysteresis": 2}, "ooo", [16, 8, 4]),
    ("hysteresis stays used up", {"window": 9, "hysteresis": 2}, "o...o", [16, 16, 16, 16, 8]),
    ("growth refills it", {"window": 2, "hysteresis": 2}, "o..oo", [16, 16, 32, 32, 16]),
    (
        "any good step refills it where it is consecutive",
        {"window": 9, "hysteresis": 2, "consecutive_hysteresis": True},
        "o.o.oo",
        [16, 16, 16, 16, 16, 8],
    ),
    ("it goes down to the minimum", {"window": 9, "hysteresis": 1, "minimum": 6.0}, "oo", [8, 6]),
]


@pytest.mark.parametrize(
    ("options", "steps", "expected"), [row[1:] for row in SEQUENCES], ids=[row[0] for row in SEQUENCES]
)
def test_the_scale_follows_the_rule(options: dict[str, float], steps: str, expected: list[float]) -> None:
    assert scales(LossScaler(scale=16.0, dynamic=True, **options), steps) == expected


def test_a_static_scale_never_changes() -> None:
    assert set(scales(LossScaler(scale=128.0, window=1, hysteresis=1), "..oo..oooo")) == {128.0}


def test_at_the_minimum_an_overflow_names_the_parameter() -> None:
    scaler = LossScaler(scale=2.0, dynamic=True, hysteresis=1, minimum=1.0)
    scaler.update(overflow=True, cause="head.weight (rank 1)")
    with pytest.raises(ScaleError, match=r"minimum of 1 .* head\.weight \(rank 1\)"):
        scaler.update(overflow=True, cause="head.weight (rank 1)")
    assert scaler.scale == 1.0


@given(
    steps=st.text("..o", max_size=40),
    window=st.integers(1, 5),
    hysteresis=st.integers(0, 4),
    consecutive=st.booleans(),
)
def test_any_sequence_follows_the_rule_read_run_by_run(
    steps: str, window: int, hysteresis: int, consecutive: bool
) -> None:
    """Between overflows lie runs of good steps; each doubles the scale once per whole window."""
    exponent, left = 200, hysteresis  # from 2 ** 200 the minimum is never reached
    runs = steps.split("o")
    for number, run in enumerate(runs):
        exponent += len(run) // window
        if len(run) >= (1 if consecutive else window):
            left = hysteresis
        if number < len(runs) - 1:
            exponent -= left <= 1
            left = max(left - 1, min(left, 1))
    scaler = LossScaler(
        scale=2.0**200, dynamic=True, window=window, hysteresis=hysteresis, consecutive_hysteresis=consecutive
    )
    scales(scaler, steps)
    assert scaler.scale == 2.0**exponent


@given(before=st.text(".o", max_size=20), after=st.text(".o", max_size=20))
def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(before: str, after: str) -> None:
    options = {"scale": 2.0**100, "dynamic": True, "window": 3, "hysteresis": 3}
    one, other = LossScaler(**options), LossScaler()
    scales(one, before)
    other.load_state_dict(one.state_dict())
    assert scales(other, after) == scales(one, after)


def test_a_smaller_window_or_hysteresis_takes_effect_in_a_run_that_goes_on() -> None:
    one = LossScaler(scale=8.0, dynamic=True, window=1000, hysteresis=4)
    scales(one, "." * 700)
    other = LossScaler(scale=1.0, dynamic=True, window=500, hysteresis=2)
    other.resume(one.state_dict())
    assert scales(other, ".") == [16.0]
    other.resume(one.state_dict())
    assert other.hysteresis_left == 2
