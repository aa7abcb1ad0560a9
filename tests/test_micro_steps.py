"""Every habit of stepping trains the weights of plain PyTorch, and calls that make no sense say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    Habit,
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
)
from zerolith.errors import UsageError
from zerolith.micro_steps import MicroSteps

GAS, STEPS = 3, 3


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


# --- the habits -------------------------------------------------------------------------------------


def step_at_the_boundary(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
    engine.step()


def step_where_the_engine_says(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        loss = loss_of(engine, batch)
        expected = batch is micro_batches[-1]
        assert engine.is_gradient_accumulation_boundary() is expected
        engine.backward(loss)
        assert engine.is_gradient_accumulation_boundary() is expected
        if engine.is_gradient_accumulation_boundary():
            engine.step()


def boundary_set_before_each_backward(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        loss = loss_of(engine, batch)
        engine.set_gradient_accumulation_boundary(batch is micro_batches[-1])
        engine.backward(loss)
        if batch is micro_batches[-1]:
            engine.step()


def boundary_set_after_the_last_backward(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    engine.set_gradient_accumulation_boundary(False)
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
        engine.step()
    engine.set_gradient_accumulation_boundary(True)
    engine.step()


def optimizer_steps_each(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
        optimizer.step()


def optimizer_steps_and_zeroes(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    optimizer.zero_grad()
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
    optimizer.step()
    optimizer.zero_grad()


def client_divides_the_loss(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch) / len(micro_batches), scale_wrt_gas=False)
        engine.step()


def plain_backward(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        loss_of(engine, batch).backward()
        engine.step()


def plain_backward_through_the_module(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        loss_of(engine.module, batch).backward()
    optimizer.step()


def no_sync_before_the_last(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    with engine.no_sync():
        for batch in micro_batches[:-1]:
            engine.backward(loss_of(engine, batch))
    engine.backward(loss_of(engine, micro_batches[-1]))
    engine.step()


def no_sync_around_all(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    with engine.no_sync():
        for batch in micro_batches:
            loss_of(engine, batch).backward()
            engine.step()


def two_losses_of_one_forward(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    engine.set_gradient_accumulation_boundary(False)
    for batch in micro_batches:
        out = engine(batch.x)
        engine.backward(((out - batch.y) ** 2)[:1].sum() / batch.y.numel(), retain_graph=True)
        engine.set_gradient_accumulation_boundary(batch is micro_batches[-1])
        engine.backward(((out - batch.y) ** 2)[1:].sum() / batch.y.numel())
    engine.step()


def evaluates_before_the_step(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
        loss_of(engine, batch)  # with gradients on, as a metric may be
        with torch.no_grad():
            loss_of(engine, batch)
        engine.step()


HABITS: list[Habit] = [
    step_each,
    step_at_the_boundary,
    step_where_the_engine_says,
    boundary_set_before_each_backward,
    boundary_set_after_the_last_backward,
    optimizer_steps_each,
    optimizer_steps_and_zeroes,
    client_divides_the_loss,
    plain_backward,
    plain_backward_through_the_module,
    no_sync_before_the_last,
    no_sync_around_all,
    two_losses_of_one_forward,
    evaluates_before_the_step,
]


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_every_habit_trains_the_weights_of_plain_pytorch(habit: Habit) -> None:
    batches = make_batches(STEPS, GAS * 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, sgd)
        for stage in STAGES:
            engine = start(config_for(stage, gas=GAS), make_optimizer=sgd)
            got = train_engine(engine, batches, habit)
            assert_close(got, expected)
            assert engine.global_steps == STEPS
            assert engine.global_samples == STEPS * GAS * 2 * MICRO
            assert engine.skipped_steps == 0

    run_ranks(2, body)


# --- calls that make no sense -----------------------------------------------------------------------


@contextmanager
def one_sentence(*words: str) -> Iterator[None]:
    """A UsageError on one line that holds `words`."""
    with pytest.raises(UsageError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def micro_batches_of(steps: int = 1, gas: int = 1) -> list[Batch]:
    return [micro for batch in make_batches(steps, gas * MICRO) for micro in my_micro_batches(batch)]


def test_calls_that_make_no_sense_say_so_and_the_engine_trains_on() -> None:
    (batch,) = micro_batches_of()
    model = make_mlp()
    engine = start(config_for(1), model=model, make_optimizer=sgd)
    with one_sentence("step() without a backward"):
        engine.step()
    with one_sentence("one element", "(2, 3)"):
        engine.backward(engine(batch.x))
    with one_sentence("one element", "NoneType"):
        engine.backward(None)
    with torch.no_grad():
        loss = loss_of(engine, batch)
    with one_sentence("does not depend on any trainable parameter"):
        engine.backward(loss)
    engine.backward(loss_of(engine, batch))
    with one_sentence("engine.step()"):
        engine.basic_optimizer.step()
    engine.step()
    with one_sentence("step() without a backward"):
        engine.step()
    expected = train_plain(model, [batch], sgd)
    got = train_engine(engine, [])
    assert_close(got._replace(norms=expected.norms), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_step_twice_after_one_micro_batch_says_so_and_updates_once(stage: int) -> None:
    batches = make_batches(2, 2 * MICRO)
    engine = start(config_for(stage, gas=2), make_optimizer=sgd)

    def twice(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
        for batch in micro_batches:
            engine.backward(loss_of(engine, batch))
            engine.step()
            with one_sentence("step()", "backward"):
                engine.step()

    assert_close(train_engine(engine, batches, twice), train_plain(make_mlp(), batches, sgd))


@pytest.mark.parametrize("call", ["forward", "backward", "step"])
def test_a_call_after_destroy_says_so(call: str) -> None:
    (batch,) = micro_batches_of()
    engine = start(config_for(2), make_optimizer=sgd)
    loss = loss_of(engine, batch)
    engine.destroy()
    engine.destroy()
    calls = {
        "forward": lambda: engine(batch.x),
        "backward": lambda: engine.backward(loss),
        "step": engine.step,
    }
    with one_sentence("destroyed", "zerolith.initialize"):
        calls[call]()


@pytest.mark.parametrize("call", ["no_sync", "zero_grad", "scale", "reset"])
def test_other_calls_after_destroy_say_so_too(call: str) -> None:
    engine = start(config_for(1), make_optimizer=sgd)
    engine.destroy()
    with one_sentence("destroyed"):
        if call == "no_sync":
            with engine.no_sync():
                pass
        elif call == "scale":
            engine.scale(torch.ones(()))
        else:
            getattr(engine, call)()


def test_an_engine_without_an_optimizer_forwards_and_says_that_it_cannot_train() -> None:
    (batch,) = micro_batches_of()
    engine = start(config_for(3))
    loss = loss_of(engine, batch)
    with one_sentence("needs an optimizer"):
        engine.backward(loss)
    with one_sentence("needs an optimizer"):
        engine.step()
    assert engine.get_lr() == []
    assert engine.get_global_grad_norm() is None
    engine.destroy()


class Breaks(torch.autograd.Function):
    """The identity, whose backward raises when told to."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if Breaks.armed:
            raise FloatingPointError("a backward that breaks")
        return grad


class Breaking(nn.Module):
    """An MLP with a seam that may break."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[2:](Breaks.apply(self.body[:2](x)))


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
def test_after_a_broken_backward_the_engine_asks_for_reset_and_then_trains_on(plain: bool) -> None:
    batches = make_batches(2, 2 * 2 * MICRO)

    def body() -> None:
        expected = train_plain(Breaking(), batches, sgd)
        for stage in STAGES:
            engine = start(config_for(stage, gas=2), model=Breaking(), make_optimizer=sgd)
            (first, second) = my_micro_batches(batches[0])
            engine.backward(loss_of(engine, first))
            Breaks.armed = True
            loss = loss_of(engine, second)
            with pytest.raises(FloatingPointError):
                loss.backward() if plain else engine.backward(loss)
            Breaks.armed = False
            for call, args in ((engine, [first.x]), (engine.step, []), (engine.backward, [loss])):
                with one_sentence("reset()"):
                    call(*args)
            engine.reset()
            assert_close(train_engine(engine, batches), expected)

    run_ranks(2, body)


def test_zero_grad_drops_what_was_accumulated_and_starts_a_new_accumulation() -> None:
    batches = make_batches(2, 2 * 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, sgd)
        for stage in STAGES:
            engine = start(config_for(stage, gas=2), make_optimizer=sgd)
            engine.backward(loss_of(engine, next(my_micro_batches(batches[1]))))
            engine.zero_grad()
            assert_close(train_engine(engine, batches), expected)

    run_ranks(2, body)


# --- the counter itself -----------------------------------------------------------------------------


@given(per_step=st.integers(1, 5), forwards=st.lists(st.integers(0, 3), max_size=12), steps=st.booleans())
def test_the_boundary_is_every_nth_backward_whatever_forwards_come_between(
    per_step: int, forwards: list[int], steps: bool
) -> None:
    """forwards[i]: how many forwards run before backward i. steps: whether step() follows each backward."""
    micro = MicroSteps(per_step)
    updates = 0
    for number, count in enumerate(forwards, start=1):
        for _ in range(count):
            micro.forward_begun()
        micro.backward_begun()
        assert micro.is_boundary() is (number % per_step == 0)
        micro.backward_done()
        assert micro.is_boundary() is (number % per_step == 0)
        if steps or number % per_step == 0:
            updates += micro.take_step()
    assert updates == len(forwards) // per_step
    assert micro.total == len(forwards)
    assert micro.since_step == len(forwards) % per_step


def test_a_boundary_set_by_hand_overrules_the_count() -> None:
    micro = MicroSteps(2)
    micro.manual = True
    micro.backward_done()
    assert micro.take_step()
    micro.manual = False
    for _ in range(4):
        micro.backward_done()
        assert not micro.take_step()
    micro.manual = True
    assert micro.take_step()


def test_gradients_that_are_dropped_again_and_again_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """By a loop of plain PyTorch that zeroes before each micro-batch."""
    engine = start(config_for(1, gas=4), make_optimizer=sgd)
    for batch in make_batches(6, MICRO):
        engine.zero_grad()
        engine.backward(loss_of(engine, batch))
        engine.step()
    assert engine.global_steps == 0
    engine.destroy()
    assert caplog.text.count("zero_grad() has dropped 3 unfinished accumulations of 4 micro-batches") == 1
