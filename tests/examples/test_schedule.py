"""The learning rate rises, falls, and depends on the share of the run alone."""

from __future__ import annotations

import pytest
import torch

from gpt.schedule import FINAL_FACTOR, learning_rate_factor, schedule


def factors(num_steps: int) -> list[float]:
    return [learning_rate_factor(step, num_steps=num_steps) for step in range(num_steps + 1)]


def test_it_rises_to_the_peak_and_then_only_falls() -> None:
    values = factors(100)
    peak = values.index(1.0)
    assert peak == 4
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak + 1 :] == sorted(values[peak + 1 :], reverse=True)
    assert values[-1] == pytest.approx(FINAL_FACTOR)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_short_runs_have_one_too(num_steps: int) -> None:
    assert all(0 < value <= 1 for value in factors(num_steps))


def test_a_longer_run_has_the_same_curve() -> None:
    assert factors(200)[60] == pytest.approx(factors(100)[30])


def test_it_drives_an_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(100)(optimizer)
    assert scheduler.get_last_lr() == [pytest.approx(2.0 / 5)]
