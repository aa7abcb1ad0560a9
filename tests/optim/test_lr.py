"""DeepSpeed's schedules: its formulas, its observed sequences, and how torch schedulers behave."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from plain import MICRO, config_for, make_batches, start, train_engine
from zerolith.errors import ConfigError
from zerolith.optim import build_scheduler
from zerolith.optim.lr import SCHEDULES, LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR


def sgd(lr: float = 1.0, groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=lr)


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The rate that each optimizer step is made with."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


# Seen at optimizer steps 0, 1, ... of DeepSpeed 0.19.8: name, rate of the optimizer, options, sequence.
OBSERVED: list[tuple[str, float, dict[str, Any], list[float]]] = [
    ("WarmupLR", 1.0, {"warmup_num_steps": 4, "warmup_type": "linear"}, [0, 0, 0.25, 0.5, 0.75, 1]),
    ("WarmupLR", 1.0, {"warmup_num_steps": 4, "warmup_min_lr": 0.1}, [0.1, 0.1, 0.55, 0.8132, 1]),
    (
        "WarmupDecayLR",
        1.0,
        {"warmup_num_steps": 4, "warmup_max_lr": 1.0, "total_num_steps": 8, "warmup_type": "linear"},
        [0, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0],
    ),
    (
        "WarmupCosineLR",
        0.5,
        {
            "warmup_num_steps": 4,
            "total_num_steps": 8,
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.01,
            "warmup_type": "linear",
        },
        [0, 0.05, 0.1625, 0.275, 0.3875, 0.4275, 0.2525, 0.0775, 0.005],
    ),
    (
        "OneCycle",
        1.0,
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 1.0,
            "cycle_first_step_size": 4,
            "decay_lr_rate": 1.0,
            "decay_step_size": 2,
            "cycle_momentum": False,
        },
        [0.1, 0.325, 0.55, 0.775, 1, 0.775, 0.55, 0.325, 0.1, 0.0667, 0.05, 0.04],
    ),
    ("LRRangeTest", 1.0, {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2}, [0.1, 0.15, 0.2, 0.25]),
    (
        "LRRangeTest",
        1.0,
        {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2, "lr_range_test_staircase": True},
        [0.1, 0.1, 0.2, 0.2, 0.3],
    ),
]


@pytest.mark.parametrize(("name", "lr", "options", "expected"), OBSERVED)
def test_rates_are_those_that_deepspeed_was_seen_to_use(
    name: str, lr: float, options: dict[str, Any], expected: list[float]
) -> None:
    assert rates(SCHEDULES[name](sgd(lr), **options), len(expected)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "lr", "options", "expected"), OBSERVED)
def test_the_engine_uses_the_same_rates(name: str, lr: float, options: dict[str, Any], expected: list[float]) -> None:
    optimizer = {"type": "SGD", "params": {"lr": lr}}
    engine = start(config_for(1, optimizer=optimizer, scheduler={"type": name, "params": options}))
    used = []
    for batch in make_batches(len(expected), MICRO):
        used.append(engine.get_lr()[0])
        engine.backward(nn.functional.mse_loss(engine(batch.x), batch.y))
        engine.step()
    assert used == pytest.approx(expected, abs=1e-4)
    engine.destroy()


@pytest.mark.parametrize(("name", "lr", "options", "expected"), OBSERVED)
def test_a_state_dict_takes_the_schedule_up_where_it_was(
    name: str, lr: float, options: dict[str, Any], expected: list[float]
) -> None:
    first = SCHEDULES[name](sgd(lr), **options)
    rates(first, 3)
    second = SCHEDULES[name](sgd(lr), **options)
    second.load_state_dict(first.state_dict())
    second.optimizer.param_groups[0]["lr"] = first.get_last_lr()[0]
    assert rates(second, len(expected) - 3) == pytest.approx(expected[3:], abs=1e-4)


def test_a_resumed_run_follows_the_schedule_of_its_own_config() -> None:
    first = WarmupDecayLR(sgd(), total_num_steps=10, warmup_max_lr=1.0, warmup_num_steps=2)
    rates(first, 5)
    longer = {"total_num_steps": 20, "warmup_max_lr": 0.5, "warmup_num_steps": 2}
    second, expected = WarmupDecayLR(sgd(), **longer), WarmupDecayLR(sgd(), **longer)
    second.load_state_dict(first.state_dict())
    assert rates(second, 6)[1:] == rates(expected, 11)[6:]


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.5, 0.95))


def test_one_cycle_moves_momentum_the_other_way_and_leaves_beta2() -> None:
    optimizer = adam()
    scheduler = OneCycle(
        optimizer, 0.1, 1.0, cycle_first_step_size=2, cycle_second_step_size=4, decay_step_size=2, decay_mom_rate=1.0
    )
    momenta = []
    for _ in range(9):
        momenta.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        scheduler.step()
    assert [beta for beta, _ in momenta] == pytest.approx([0.9, 0.85, 0.8, 0.825, 0.85, 0.875, 0.9, 1.35, 1.8])
    assert {beta for _, beta in momenta} == {0.95}


def test_one_cycle_says_when_there_is_no_momentum_to_move(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zerolith"):
        OneCycle(sgd(), 0.1, 1.0)
    assert "SGD has no betas" in caplog.text


def test_groups_have_rates_of_their_own() -> None:
    optimizer = sgd(groups=2)
    optimizer.param_groups[1]["lr"] = 3.0
    scheduler = WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear")
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [1.0, 3.0]
    listed = LRRangeTest(sgd(groups=2), lr_range_test_min_lr=[0.1, 0.2])
    assert listed.get_last_lr() == [0.1, 0.2]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("WarmupLR", {"warmup_type": "cubic"}, "'log' or 'linear'"),
    ("WarmupLR", {"warmup_min_lr": [0.1, 0.2]}, "2 numbers for 1 param groups"),
    ("WarmupDecayLR", {"total_num_steps": 0}, "total_num_steps is 0"),
    ("WarmupDecayLR", {}, "total_num_steps"),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0}, "cycle_first_step_size is 0"),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_steps": 3}, "did you mean 'warmup_num_steps'"),
    ("WarmupLr", {}, "did you mean 'WarmupLR'"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_wrong_options_are_refused_with_a_sentence(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        start(config_for(0, optimizer={"type": "SGD", "params": {}}, scheduler={"type": name, "params": options}))
    assert "scheduler." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zerolith"):
        WarmupDecayLR(sgd(), total_num_steps=5, warmup_num_steps=10)
    assert "warm-up never ends" in caplog.text


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    warmup=st.integers(0, 20),
    total=st.integers(1, 60),
    kind=st.sampled_from(["log", "linear"]),
    floor=st.floats(0, 0.5),
)
def test_warm_ups_rise_then_fall_and_stay_in_their_range(warmup: int, total: int, kind: str, floor: float) -> None:
    decay = WarmupDecayLR(
        sgd(), total, warmup_min_lr=floor, warmup_max_lr=1.0, warmup_num_steps=warmup, warmup_type=kind
    )
    cosine = WarmupCosineLR(sgd(), total, warmup_num_steps=warmup, cos_min_ratio=floor, warmup_type=kind)
    for scheduler, lowest in ((decay, floor), (cosine, 0.0)):
        seen = rates(scheduler, total + 5)
        top = seen.index(max(seen))
        assert all(lowest - 1e-9 <= lr <= 1 + 1e-9 for lr in seen)
        assert seen[: top + 1] == sorted(seen[: top + 1])
        assert seen[top:] == sorted(seen[top:], reverse=True)


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    optimizer = {"type": "SGD", "params": {"lr": 1.0}}
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}}
    engine = start(config_for(0, optimizer=optimizer, scheduler=scheduler))
    (batch,) = make_batches(1, MICRO)
    for factor in (1.0, float("nan"), 1.0):
        engine.backward(nn.functional.mse_loss(engine(batch.x), batch.y) * factor)
        engine.step()
    assert engine.get_lr() == [0.25], "two steps were made"
    engine.destroy()


def test_one_rank_trains_with_the_schedule_as_plain_torch_does() -> None:
    batches = make_batches(4, MICRO)
    config = config_for(3, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    named = train_engine(
        start({**config, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}}), batches
    )
    engine = start(config, lr_scheduler=lambda optimizer: WarmupLR(optimizer, warmup_num_steps=2))
    given = train_engine(engine, batches)
    assert all(torch.equal(named.weights[name], given.weights[name]) for name in named.weights)


def test_what_deepspeed_takes_is_taken() -> None:
    params = {"warmup_num_steps": 4, "last_batch_iteration": -1}
    assert build_scheduler("WarmupLR", params, sgd()).last_epoch == 0
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_stair_count": 0, "cycle_second_stair_count": None}
    assert rates(build_scheduler("OneCycle", cycle, sgd()), 3) == rates(OneCycle(sgd(), 0.1, 1.0), 3)
    with pytest.raises(ConfigError, match=r"scheduler\.params: WarmupLR refuses them: .*initial_lr"):
        build_scheduler("WarmupLR", {"last_epoch": 100}, sgd())
