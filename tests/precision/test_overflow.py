"""A gradient that is not finite anywhere skips the step everywhere, and is told of."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    assert_close,
    config_for,
    loss_of,
    make_batches,
    make_mlp,
    my_micro_batches,
    start,
    step_each,
    train_engine,
    train_plain,
    whole_weights,
)
from zerolith.errors import ScaleError


class Records(logging.Handler):
    """The library's warnings while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Records:
        logging.getLogger("zerolith").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("zerolith").removeHandler(self)


class Net(nn.Module):
    """An MLP in the dtype of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.to(self.body[0].bias.dtype))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def poison(batch: Batch, value: float, *, rank: int) -> Batch:
    """The same with one bad target in what rank `rank` gets, so that every parameter's gradient is bad."""
    y = batch.y.clone()
    y[rank * MICRO, 0] = value
    return batch._replace(y=y)


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}},
    "static fp16": {"fp16": {"enabled": True, "loss_scale": 16.0}},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "inf"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_is_told_once(precision: str, value: float) -> None:
    batches = make_batches(3, 2 * MICRO)
    batches[1] = poison(batches[1], value, rank=1)
    overrides = PRECISIONS[precision]

    def body() -> list[str]:
        lines = []
        for stage in STAGES:
            engine = start(config_for(stage, **overrides), model=Net(), make_optimizer=sgd)
            engine.lr_scheduler = torch.optim.lr_scheduler.StepLR(engine.optimizer, step_size=1, gamma=0.5)
            with Records() as records:
                step_each(engine, engine.optimizer, list(my_micro_batches(batches[0])))
                before, state = whole_weights(engine), state_of(engine)
                step_each(engine, engine.optimizer, list(my_micro_batches(batches[1])))
            assert not engine.was_step_applied()
            assert engine.optimizer.overflow is True
            assert engine.get_global_grad_norm() == math.inf
            assert (engine.skipped_steps, engine.global_steps, engine.global_samples) == (1, 2, 8)
            assert engine.get_lr() == [0.05]
            after = whole_weights(engine)
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(torch.equal(one, other) for one, other in zip(state, state_of(engine), strict=True))
            scale = {"fp16": 8.0, "static fp16": 16.0}.get(precision, 1.0)
            assert engine.loss_scale() == engine.optimizer.loss_scale == scale
            step_each(engine, engine.optimizer, list(my_micro_batches(batches[2])))
            assert engine.was_step_applied()
            assert engine.optimizer.overflow is False
            assert engine.get_lr() == [0.025]
            engine.destroy()
            lines += records.lines
        return lines

    first, second = run_ranks(2, body)
    assert second == []
    assert len(first) == len(STAGES)
    for line in first:
        assert "step 2 skipped" in line
        assert "body." in line
        assert "rank" in line


def state_of(engine: Any) -> list[torch.Tensor]:
    return [
        value.clone()
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been() -> None:
    good = make_batches(3, 2 * MICRO)
    bad = [good[0], poison(good[1], math.nan, rank=0), *good[1:]]

    def body() -> None:
        expected = train_plain(make_mlp(), good, sgd)
        for stage in STAGES:
            got = train_engine(start(config_for(stage), make_optimizer=sgd), bad)
            assert got.applied == [True, False, True, True]
            norms = [norm for norm, applied in zip(got.norms, got.applied, strict=True) if applied]
            assert_close(got._replace(norms=norms, applied=[True] * 3), expected)

    run_ranks(2, body)


def test_a_large_but_finite_gradient_is_no_overflow() -> None:
    """Its square is beyond fp32, which is where norms overflow that are computed without care."""
    batch = make_batches(1, MICRO)[0]
    batch = batch._replace(y=batch.y * 1e25)
    for stage in STAGES:
        got = train_engine(start(config_for(stage, gradient_clipping=1.0), make_optimizer=sgd), [batch])
        expected = train_plain(make_mlp().double(), [Batch(batch.x.double(), batch.y.double())], sgd, clip=1.0)
        assert got.applied == [True]
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)


def test_bf16_can_be_told_to_step_anyway() -> None:
    config = config_for(1, bf16={"enabled": True, "check_grad_overflow": False})
    engine = start(config, model=Net(), make_optimizer=sgd)
    got = train_engine(engine, [poison(make_batches(1, MICRO)[0], math.nan, rank=0)])
    assert got.applied == [True]
    assert engine.skipped_steps == 0
    assert all(weight.isnan().any() for weight in got.weights.values())


def test_at_the_minimum_scale_every_rank_raises_and_names_the_parameter() -> None:
    batches = [poison(batch, math.nan, rank=1) for batch in make_batches(2, 2 * MICRO)]
    fp16 = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 1.0}

    def body() -> None:
        engine = start(config_for(2, fp16=fp16), model=Net(), make_optimizer=sgd)
        step_each(engine, engine.optimizer, list(my_micro_batches(batches[0])))
        assert engine.loss_scale() == 1.0
        with pytest.raises(ScaleError, match=r"body\.\d\.(weight|bias)"):
            step_each(engine, engine.optimizer, list(my_micro_batches(batches[1])))

    run_ranks(2, body)


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_without_scaling_the_loss_says_how_to(stage: int) -> None:
    engine = start(config_for(stage, **PRECISIONS["fp16"]), model=Net(), make_optimizer=sgd)
    batch = make_batches(1, MICRO)[0]
    with pytest.raises(RuntimeError, match=r"engine\.backward\(loss\), or engine\.scale\(loss\)\.backward\(\)"):
        loss_of(engine, batch).backward()
    engine.backward(loss_of(engine, batch))
    engine.step()
    assert engine.was_step_applied()
    engine.destroy()
