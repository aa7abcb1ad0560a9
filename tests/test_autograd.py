"""What people do with autograd beside one backward of one loss: counted right, and the same on every rank."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from harness import run_ranks
from models import error_between, sgd, start_engine, whole_weights, zero_config
from zerolith.errors import UsageError
from zerolith.zero import GatheredParameters

WIDTH, STEPS = 8, 3
EVERY_STAGE = pytest.mark.parametrize("stage", [0, 1, 2, 3])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.outer(torch.tanh(self.inner(x))))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer(), Layer(), nn.Linear(WIDTH, 1))


def config_for(stage: int, *, gas: int = 1) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": 20}
    return zero_config(stage, gradient_accumulation_steps=gas, zero_optimization=zero)


def data(step: int, rank: int, micro: int = 0) -> Tensor:
    seed = 1000 * step + 10 * micro + rank
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *,
    gas: int = 1,
    world: int = 1,
    steps: int = STEPS,
    prepare: Callable[[nn.Module], object] = id,
) -> dict[str, Tensor]:
    """Weights after training by `loss`(model, x, rank) in plain PyTorch."""
    model = copy.deepcopy(model)
    prepare(model)
    optimizer = sgd(model)
    for step in range(steps):
        for rank in range(world):
            for micro in range(gas):
                (loss(model, data(step, rank, micro), rank) / gas / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def error(engine: Any, expected: dict[str, Tensor]) -> float:
    return error_between(whole_weights(engine), expected)


def trains_as_plain_pytorch(engine: Any) -> bool:
    """On two ranks, from the weights of make_model on."""
    for step in range(STEPS):
        engine.backward(engine(data(step, engine.global_rank)).square().mean())
        engine.step()
    return error(engine, plain(make_model(), lambda model, x, rank: model(x).square().mean(), world=2)) < 1e-5


# --- gradients that train nothing ---------------------------------------------------------------


def adversarial(model: Any, x: Tensor, rank: int = 0) -> Tensor:
    """The loss of an input that was moved against the model (Goodfellow et al., arXiv:1412.6572)."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().mean(), x)
    return model(x.detach() + 0.1 * slope.sign()).square().mean()


@EVERY_STAGE
def test_the_gradient_of_an_input_is_no_micro_batch(stage: int) -> None:
    def body() -> None:
        engine = start_engine(make_model(), config_for(stage, gas=2), sgd)
        for step in range(STEPS):
            for micro in range(2):
                engine.backward(adversarial(engine, data(step, engine.global_rank, micro)))
                engine.step()
            assert engine.global_steps == step + 1
        assert engine.micro_steps == 2 * STEPS
        assert error(engine, plain(make_model(), adversarial, gas=2, world=2)) < 1e-5

    run_ranks(2, body)


@EVERY_STAGE
def test_another_models_loss_is_no_micro_batch_of_a_frozen_engine(stage: int) -> None:
    """As a discriminator is used to train a generator."""

    def body() -> None:
        frozen = start_engine(make_model(), config_for(stage, gas=2), sgd)
        engine = start_engine(nn.Linear(WIDTH, WIDTH), config_for(stage, gas=2), sgd)
        frozen.module.requires_grad_(False)
        for step in range(2 * STEPS):
            engine.backward(frozen(engine(data(step, engine.global_rank))).square().mean())
            engine.step()
        assert (engine.global_steps, engine.micro_steps) == (STEPS, 2 * STEPS)
        assert (frozen.global_steps, frozen.micro_steps) == (0, 0)

    run_ranks(2, body)


def test_the_gradient_of_parameters_is_no_micro_batch() -> None:
    engine = start_engine(make_model(), config_for(1, gas=2), sgd)
    grads = torch.autograd.grad(engine(data(0, 0)).sum(), list(engine.module.parameters()))
    assert all(grad.count_nonzero() for grad in grads)
    assert engine.micro_steps == 0
    engine.destroy()


# --- backwards that the engine learns of late ---------------------------------------------------


@dataclass
class Output:
    value: Tensor


class Recomputed(nn.Module):
    """Three micro-batches a step, each in three graph tasks, behind an output that only a close look finds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, x: Tensor) -> Output:
        x = x.clone().requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return Output(x.square().mean())


@EVERY_STAGE
def test_a_plain_backward_of_a_dataclass_is_one_micro_batch(stage: int) -> None:
    def body() -> None:
        torch.manual_seed(0)
        engine = start_engine(Recomputed(), config_for(stage, gas=3), sgd)
        for step in range(STEPS):
            for micro in range(3):
                engine(data(step, engine.global_rank, micro)).value.backward()
                engine.step()
        assert (engine.global_steps, engine.micro_steps) == (STEPS, 3 * STEPS)
        assert error(engine, plain(Recomputed(), lambda model, x, rank: model(x).value, gas=3, world=2)) < 1e-5

    run_ranks(2, body)


class Skipping(nn.Module):
    """The last layer is in the graph of rank 0 alone; the output hides where its gradient comes from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Maybe(), Maybe(), Maybe()])

    def forward(self, x: Tensor, rank: int) -> Output:
        for number, layer in enumerate(self.layers):
            x = layer(x, use=number < 2 or rank == 0)
        return Output(x.square().mean())


class Maybe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, use: bool) -> Tensor:
        return torch.tanh(self.inner(x)) if use else x * 1.0


@EVERY_STAGE
def test_ranks_whose_first_gradient_is_another_reduce_in_one_order(stage: int) -> None:
    def body() -> None:
        engine = start_engine(Skipping(), config_for(stage), sgd)
        for step in range(STEPS):
            rank = engine.global_rank
            engine.module(data(step, rank), rank).value.backward()  # past the engine
            engine.step()
        assert error(engine, plain(Skipping(), lambda model, x, rank: model(x, rank).value, world=2)) < 1e-5

    run_ranks(2, body)


# --- gradients that come late on one rank -------------------------------------------------------


class Odd(nn.Module):
    """Rank 1 uses a layer's weight outside the layer, or a layer once more."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layers, self.what = make_model(), what

    def forward(self, x: Tensor, rank: int) -> Tensor:
        if self.what == "weight" and rank == 1:
            x = x + F.linear(x, self.layers[1].inner.weight)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.what == "layer" and rank == 1 and number == 1:
                x = layer(self.layers[0](x))
        penalty = self.layers[2].inner.weight.square().mean() if self.what == "penalty" and rank == 1 else 0.0
        return x.square().mean() + penalty


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("what", ["weight", "layer", "penalty"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_comes_late_on_one_rank_is_in_the_step(
    stage: int, what: str, forwards: int, precision: dict[str, Any]
) -> None:
    """`forwards` run before their backwards do."""

    def loss(model: Any, x: Tensor, rank: int) -> Tensor:
        return model(x, rank)

    def body() -> None:
        engine = start_engine(Odd(what), {**config_for(stage, gas=2), **precision}, sgd)
        rank = engine.global_rank
        for step in range(STEPS):
            for first in range(0, 2, forwards):
                micros = [data(step, rank, micro) for micro in range(first, first + forwards)]
                for each in [loss(engine, x.to(engine.module.layers[3].weight.dtype), rank) for x in micros]:
                    engine.backward(each)
            engine.step()
        assert engine.global_steps == STEPS
        tolerance = 0.03 if precision else 1e-5
        assert error(engine, plain(Odd(what), loss, gas=2, world=2)) < tolerance

    run_ranks(2, body)


# --- forwards in odd moments --------------------------------------------------------------------


class Stop(BaseException):
    """What Ctrl-C raises: no hook of torch's hears of it."""


@EVERY_STAGE
def test_an_interrupted_forward_is_heard_of_at_the_step(stage: int) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        x = data(0, engine.global_rank)
        handle = engine.module[1].register_forward_hook(stop)
        with pytest.raises(Stop):
            engine(x)
        handle.remove()
        engine.backward(engine(x).square().mean())
        with pytest.raises(UsageError, match=r"forward of a Sequential.*engine\.reset\(\)"):
            engine.step()
        engine.reset()
        assert trains_as_plain_pytorch(engine)

    run_ranks(2, body)


@EVERY_STAGE
def test_step_and_reset_inside_of_gathered_parameters(stage: int) -> None:
    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        engine.backward(engine(data(0, engine.global_rank)).square().mean())
        with GatheredParameters(list(engine.module.parameters())):
            if stage == 3:
                with pytest.raises(UsageError, match="leave it before the step"):
                    engine.step()
            engine.reset()
        assert all(unit.uses == 0 for unit in engine._sharded.units)
        assert trains_as_plain_pytorch(engine)

    run_ranks(2, body)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_another_thread_may_run_forwards(stage: int) -> None:
    engine = start_engine(make_model(), config_for(stage), sgd)
    end, errors = threading.Event(), []

    def act() -> None:
        try:
            while not end.is_set():
                with torch.no_grad():
                    engine.module(data(9, 0))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        for step in range(20):
            engine.backward(engine(data(step, 0)).square().mean())
            engine.step()
    finally:
        end.set()
        thread.join()
    assert errors == []
    expected = plain(make_model(), lambda model, x, rank: model(x).square().mean(), steps=20)
    assert error(engine, expected) < 1e-5
    engine.destroy()


def test_outputs_that_are_parameters_gather_no_hooks() -> None:
    class WithScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (self.scale * x).sum(), self.scale

    engine = start_engine(WithScale(), config_for(0), sgd)
    for _ in range(3):
        loss, scale = engine(torch.ones(3))
        engine.backward(loss)
        engine.step()
    assert not scale._backward_hooks
    engine.destroy()


# --- no_sync within no_sync ---------------------------------------------------------------------


def test_leaving_an_inner_no_sync_does_not_leave_the_outer_one() -> None:
    def body() -> int:
        engine = start_engine(make_model(), config_for(2, gas=4), sgd)
        traffic = engine._sharded.comm.traffic
        with engine.no_sync():
            for inner in (engine.no_sync, engine.coalesce_grad_reduction):
                with inner():
                    engine.backward(engine(data(0, engine.global_rank)).mean())
            before = dict(traffic.calls)
            engine.backward(engine(data(1, engine.global_rank)).mean())
            assert dict(traffic.calls) == before
        return sum(traffic.calls.values())

    run_ranks(2, body)


# --- parameters that are not what they were -----------------------------------------------------


@EVERY_STAGE
def test_gradients_from_before_initialize_are_not_in_the_first_step(stage: int) -> None:
    def body() -> None:
        model = make_model()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        engine = start_engine(model, config_for(stage), sgd)
        assert trains_as_plain_pytorch(engine)

    run_ranks(2, body)


def assigned(model: nn.Module) -> None:
    model[0].inner.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))


def data_replaced(model: nn.Module) -> None:
    model[0].inner.weight.data = torch.zeros(WIDTH, WIDTH)


def moved(model: nn.Module) -> None:
    model.double().float()


@pytest.mark.parametrize(
    ("stage", "change"),
    [(stage, change) for stage in (0, 2, 3) for change in (assigned, data_replaced, moved) if stage < 3]
    + [(3, assigned)],
)
def test_a_parameter_that_was_replaced_is_named_at_the_step(stage: int, change: Callable[[nn.Module], None]) -> None:
    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        change(engine.module)
        engine.backward(engine(data(0, engine.global_rank)).square().mean())
        with pytest.raises(UsageError, match=r"no longer holds the parameter '\d\."):
            engine.step()

    run_ranks(2, body)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_that_is_held_elsewhere_is_trained_on(stage: int) -> None:
    """As pruning does: the weight is a product of it with a mask from then on."""

    def halve(model: nn.Module) -> None:
        prune.l1_unstructured(model[0].inner, "weight", amount=0.5)

    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        halve(engine.module)
        for step in range(STEPS):
            engine.backward(engine(data(step, engine.global_rank)).square().mean())
            engine.step()
        expected = plain(make_model(), lambda model, x, rank: model(x).square().mean(), world=2, prepare=halve)
        found = dict(engine.module.named_parameters())
        assert error_between({name: found[name].detach() for name in expected}, expected) < 1e-5

    run_ranks(2, body)


# --- what is held while backward runs -----------------------------------------------------------


def held_after_backwards(stage: int, *, stray: bool, plain_backward: bool) -> list[int]:
    """Sections with a gradient that was not reduced behind backward, for each micro-batch."""
    engine = start_engine(Nested(), config_for(stage, gas=4), sgd)
    reducer, held = engine._sharded.reducer, []
    end = reducer.end

    def watched() -> None:
        held.append(sum(reducer.late()))
        end()

    reducer.end = watched
    for step in range(3):
        for micro in range(4):
            x = data(step, engine.global_rank, micro)
            if stray and micro == 1:
                engine(x)
            loss = engine(x).square().mean()
            loss.backward() if plain_backward else engine.backward(loss)
        engine.step()
    return held


class Nested(nn.Module):
    """Blocks that recompute, by reentrant checkpoints, a part of themselves that is no unit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Recomputing() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if x.requires_grad else x.clone().requires_grad_()
        return checkpoint(lambda x: torch.tanh(x @ self.weight), x, use_reentrant=True)


@pytest.mark.parametrize("plain_backward", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_leave_behind_backward(stage: int, plain_backward: bool) -> None:
    """A forward whose backward never comes delays those of one micro-batch at most."""
    for held in run_ranks(2, lambda: held_after_backwards(stage, stray=False, plain_backward=plain_backward)):
        assert held == [0] * 12
    for held in run_ranks(2, lambda: held_after_backwards(stage, stray=True, plain_backward=plain_backward)):
        assert [count > 0 for count in held] == [False, True, False, False] * 3


@EVERY_STAGE
def test_load_state_dict_may_not_assign(stage: int) -> None:
    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        with pytest.raises(UsageError, match="assign=True"):
            engine.module.load_state_dict(make_model().state_dict(), assign=True)

    run_ranks(2, body)


@EVERY_STAGE
def test_functional_call_computes_with_what_it_is_given(stage: int) -> None:
    def body() -> None:
        engine = start_engine(make_model(), config_for(stage), sgd)
        other = {name: torch.randn_like(param) for name, param in make_model().named_parameters()}
        x = data(0, engine.global_rank)
        with torch.no_grad():
            engine(x)
            expected = torch.func.functional_call(make_model(), other, x)
            assert torch.equal(torch.func.functional_call(engine.module, other, x), expected)
            assert torch.equal(engine(x), make_model()(x))

    run_ranks(2, body)


@EVERY_STAGE
def test_requires_grad_is_followed_on_whichever_parameter_it_is_switched(stage: int) -> None:
    def body() -> None:
        model = make_model()
        kept = dict(model.named_parameters())
        engine = start_engine(model, config_for(stage), lambda copied: sgd(copied))
        real = {member.name: member.param for section in engine._sharded.sections for member in section.members}
        assert real.keys() == kept.keys()
        reference = make_model()
        optimizer = sgd(reference)
        for step in range(6):
            for params in (real, dict(reference.named_parameters())) if step in (1, 3) else ():
                for name in ("1.inner.weight", "1.inner.bias"):
                    params[name].requires_grad_(step == 3)
            if step == 4:
                for each in (engine.module, reference):
                    each[1].inner.requires_grad_(False)
            for rank in range(2):
                (reference(data(step, rank)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(data(step, engine.global_rank)).square().mean())
            engine.step()
        assert error(engine, {name: param.detach() for name, param in reference.named_parameters()}) < 1e-5

    run_ranks(2, body)
