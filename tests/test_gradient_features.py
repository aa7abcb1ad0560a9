"""Sums and means, division before the wire, batch sizes that change, and boundaries that the client owns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Trained,
    assert_close,
    assert_same_bits,
    config_for,
    loss_of,
    make_batches,
    make_mlp,
    my_micro_batches,
    start,
    train_engine,
    train_plain,
)
from zerolith.errors import ConfigError, UsageError
from zerolith.zero import safe_get_full_grad

EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)
SGD = {"type": "SGD", "params": {"lr": 0.05}}


def trained(stage: int, *, gas: int = 1, **overrides: Any) -> Trained:
    batches = make_batches(3, 2 * gas * MICRO)
    return train_engine(start(config_for(stage, gas=gas, optimizer=SGD, **overrides)), batches)


def plain(lr: float, *, gas: int = 1) -> Trained:
    batches = make_batches(3, 2 * gas * MICRO)
    return train_plain(make_mlp(), batches, lambda params: torch.optim.SGD(params, lr=lr))


@EVERY_STAGE
def test_sum_adds_up_what_mean_would_average(stage: int) -> None:
    """The sum over two ranks is twice the mean: SGD steps twice as far."""

    def body() -> None:
        by_sum = trained(stage, gas=2, gradient_allreduce_op="sum")
        expected = plain(0.1, gas=2)
        assert_close(by_sum, Trained(expected.weights, [2 * norm for norm in expected.norms]), rtol=1e-5)

    run_ranks(2, body)


@EVERY_STAGE
def test_division_before_the_wire_changes_no_bit_for_a_power_of_two(stage: int) -> None:
    def body() -> None:
        for gas in (1, 2):
            divided = trained(stage, gas=gas, prescale_gradients=True, gradient_predivide_factor=4.0)
            assert_same_bits(divided, trained(stage, gas=gas))

    run_ranks(2, body)


class Steep(nn.Module):
    """Gradients near the end of fp16's range: their sum over two ranks is beyond it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * x).sum()


@EVERY_STAGE
def test_division_keeps_sums_within_the_range_of_the_wire(stage: int) -> None:
    """Only where a backend adds in the wire dtype could they leave it; here they are added in fp32 at once."""

    def body() -> None:
        for factor in (1.0, 2.0):
            config = config_for(stage, optimizer=SGD, communication_data_type="fp16")
            config |= {"prescale_gradients": True, "gradient_predivide_factor": factor}
            engine = start(config, model=Steep())
            engine.backward(engine(torch.full((64,), 60_000.0)))
            assert safe_get_full_grad(engine.module.weight).tolist() == [60_000.0] * 64
            engine.step()
            assert engine.was_step_applied()
            engine.destroy()

    run_ranks(2, body)


def test_a_divisor_without_its_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match="only with prescale_gradients"):
        start(config_for(0, optimizer=SGD, gradient_predivide_factor=2.0))
    with pytest.raises(ConfigError, match="gradient_allreduce_op"):
        start(config_for(0, optimizer=SGD, gradient_allreduce_op="max"))


# --- batch sizes ------------------------------------------------------------------------------------


@EVERY_STAGE
def test_the_batch_may_grow_and_shrink_between_steps(stage: int) -> None:
    sizes = (1, 3, 2, 1)  # micro-batches of each step: no multiples of each other
    batches = [make_batches(1, 2 * gas * MICRO, seed=gas)[0] for gas in sizes]

    def body() -> None:
        expected = train_plain(make_mlp(), batches, lambda params: torch.optim.SGD(params, lr=0.05))
        engine = start(config_for(stage, optimizer=SGD))
        norms = []
        for gas, batch in zip(sizes, batches, strict=True):
            engine.set_train_batch_size(2 * gas * MICRO)
            assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (2 * gas * MICRO, gas)
            for number, micro in enumerate(my_micro_batches(batch), 1):
                engine.backward(loss_of(engine, micro))
                engine.step()
                assert engine.was_step_applied() == (number == gas)
            norms.append(engine.get_global_grad_norm())
        assert engine.global_samples == sum(2 * gas * MICRO for gas in sizes)
        assert_close(Trained(train_engine(engine, []).weights, norms), expected, rtol=1e-5)

    run_ranks(2, body)


def test_batch_sizes_that_do_not_fit_are_refused() -> None:
    engine = start(config_for(0, gas=2, optimizer=SGD))
    for size in (0, MICRO + 1):
        with pytest.raises(UsageError, match=f"multiple of {MICRO}"):
            engine.set_train_batch_size(size)
    with pytest.raises(UsageError, match="at least 1"):
        engine.set_train_micro_batch_size(0)
    (batch,) = make_batches(1, MICRO)
    engine.backward(loss_of(engine, batch))
    with pytest.raises(UsageError, match="1 micro-batches wait"):
        engine.set_train_batch_size(MICRO)
    engine.zero_grad()
    engine.set_train_batch_size(MICRO)
    engine.set_train_micro_batch_size(2 * MICRO)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (2 * MICRO, 2 * MICRO)
    assert engine.gradient_accumulation_steps() == 1


# --- boundaries -------------------------------------------------------------------------------------


@EVERY_STAGE
def test_unmanaged_every_step_updates_with_what_came_before_it(stage: int) -> None:
    counts = (1, 3, 2)  # backwards before each step; each is divided by the client, as its loss says
    batches = [make_batches(1, 2 * count * MICRO, seed=count)[0] for count in counts]

    def body() -> None:
        expected = train_plain(make_mlp(), batches, lambda params: torch.optim.SGD(params, lr=0.05))
        engine = start(config_for(stage, optimizer=SGD, managed_gradient_accumulation=False))
        norms = []
        for count, batch in zip(counts, batches, strict=True):
            for micro in my_micro_batches(batch):
                engine.backward(loss_of(engine, micro) / count)
            engine.step()
            assert engine.was_step_applied()
            norms.append(engine.get_global_grad_norm())
        assert engine.global_steps == 3
        assert engine.global_samples == sum(counts) * 2 * MICRO
        with pytest.raises(UsageError, match="without a backward"):
            engine.step()
        assert_close(Trained(train_engine(engine, []).weights, norms), expected, rtol=1e-5)

    run_ranks(2, body)


@EVERY_STAGE
def test_coalesced_backwards_are_reduced_once_and_train_the_same(stage: int) -> None:
    batches = make_batches(3, 2 * 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, lambda params: torch.optim.SGD(params, lr=0.05))
        engine = start(config_for(stage, gas=2, optimizer=SGD))
        calls, norms = engine._sharded.comm.traffic.calls, []
        for batch in batches:
            calls.clear()
            with engine.coalesce_grad_reduction():
                for micro in my_micro_batches(batch):
                    engine.backward(loss_of(engine, micro))
                assert calls["reduce_scatter"] == 0
            assert calls["reduce_scatter"] == len(engine._sharded.gradients)
            assert safe_get_full_grad(next(engine.module.parameters())) is not None
            engine.step()
            assert engine.was_step_applied()
            norms.append(engine.get_global_grad_norm())
        assert calls["reduce_scatter"] == len(engine._sharded.gradients)
        assert_close(Trained(train_engine(engine, []).weights, norms), expected, rtol=1e-5)

    run_ranks(2, body)


@EVERY_STAGE
def test_plain_backward_trains_as_the_engines_own(stage: int) -> None:
    batches = make_batches(3, 2 * 2 * MICRO)

    def body() -> None:
        engine, norms = start(config_for(stage, gas=2, optimizer=SGD)), []
        for batch in batches:
            for micro in my_micro_batches(batch):
                loss_of(engine, micro).backward()
                engine.step()
            norms.append(engine.get_global_grad_norm())
        own = trained(stage, gas=2)
        assert_same_bits(Trained(train_engine(engine, []).weights, norms, own.applied), own)

    run_ranks(2, body)
