"""Optimizers that nobody told zerolith about: what they need is found out by trying, or they say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    assert_close,
    config_for,
    make_batches,
    make_mlp,
    start,
    train_engine,
    train_plain,
)
from zerolith.errors import OptimizerError
from zerolith.member import Granularity
from zerolith.optim import granularities_of


class ThirdParty(Optimizer):
    """Steps each parameter by `update`, with what it keeps as attributes of its own."""

    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})
        self.beta = 0.9  # torch's copying of optimizers leaves such attributes out
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group)

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        raise AssertionError(f"{type(self).__name__} does not say how it steps a parameter")


class Lion(ThirdParty):
    """Element-wise: the sign of an interpolated momentum (smooth here, so that last bits do not show)."""

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
        direction = torch.tanh(100 * (self.beta * momentum + (1 - self.beta) * param.grad))
        param.sub_(group["lr"] * direction)
        momentum.mul_(self.beta).add_(param.grad, alpha=1 - self.beta)


class MatrixNormalised(ThirdParty):
    """Tensor-wise: the gradient divided by its own norm."""

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        param.sub_(group["lr"] * param.grad / (param.grad.norm() + 1e-8))


class GloballyClipped(ThirdParty):
    """Mixes parameters: divides every gradient by the norm of all of them."""

    def step(self, closure: Any = None) -> None:
        self.norm = sum(p.grad.square().sum() for g in self.param_groups for p in g["params"]).sqrt()
        super().step()

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        param.sub_(group["lr"] * self.beta * param.grad / self.norm)


class Hybrid(ThirdParty):
    """Element-wise in some groups, tensor-wise in those with `whole`."""

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        scale = param.grad.norm() if group.get("whole") else 1.0
        param.sub_(group["lr"] * param.grad / scale)


class MatricesOnly(ThirdParty):
    """Refuses anything but matrices."""

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        if param.dim() != 2:
            raise ValueError("a matrix is wanted")
        param.sub_(group["lr"] * param.grad)


class Anchored(ThirdParty):
    """Makes its state when it is built: pulls weights back to where they began."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].update(anchor=param.detach().clone(), pull=0.5, step=torch.tensor(0.0))

    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        state["step"] += 1
        pull = state["pull"] / state["step"]
        param.sub_(group["lr"] * (param.grad + pull * (param - state["anchor"])))


class AnchoredElements(Anchored):
    """The same, and says what it needs: on trial without its state it would take no tensor."""

    granularity = "element"


def params() -> list[nn.Parameter]:
    return list(make_mlp().parameters())


def hybrid(options: dict[str, Any]) -> Optimizer:
    first, *rest = params()
    return Hybrid([{"params": rest}, {"params": [first], **options}])


def warming_up(optimizer: Optimizer) -> Optimizer:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    return optimizer


ELEMENT, TENSOR = Granularity.ELEMENT, Granularity.TENSOR
FOUND: list[tuple[str, Callable[[], Optimizer], list[Granularity]]] = [
    ("element-wise", lambda: Lion(params()), [ELEMENT]),
    ("a subclass of torch's AdamW", lambda: type("Mine", (torch.optim.AdamW,), {})(params()), [ELEMENT]),
    ("tensor-wise", lambda: MatrixNormalised(params()), [TENSOR]),
    ("tensor-wise with a tiny rate", lambda: MatrixNormalised(params(), lr=1e-12), [TENSOR]),
    ("tensor-wise, warming up from 0", lambda: warming_up(MatrixNormalised(params())), [TENSOR]),
    ("element-wise, warming up from 0", lambda: warming_up(Lion(params())), [ELEMENT]),
    ("tensor-wise in the last group", lambda: hybrid({"whole": True}), [ELEMENT, TENSOR]),
    ("element-wise in both groups", lambda: hybrid({"lr": 0.5}), [ELEMENT, ELEMENT]),
    ("for matrices only", lambda: MatricesOnly([nn.Parameter(torch.zeros(4, 4))]), [TENSOR]),
    (
        "element-wise by its own word",
        lambda: type("Says", (MatrixNormalised,), {"granularity": "element"})(params()),
        [ELEMENT],
    ),
    (
        "tensor-wise by its own word",
        lambda: type("Says", (GloballyClipped,), {"granularity": "tensor"})(params()),
        [TENSOR],
    ),
]


@pytest.mark.parametrize(("make", "expected"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_what_an_optimizer_needs_is_found_out(make: Callable[[], Optimizer], expected: Granularity) -> None:
    assert granularities_of(make()) == expected


def test_finding_out_leaves_the_optimizer_and_the_random_numbers_as_they_were() -> None:
    calls: list[int] = []
    optimizer = Lion(params())
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    weights = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    group, random = optimizer.param_groups[0], torch.get_rng_state()
    granularities_of(optimizer)
    assert optimizer.param_groups[0] is group
    assert group["lr"] == 0.01
    assert not optimizer.state
    assert optimizer.num_steps == 0
    assert not calls
    assert torch.equal(torch.get_rng_state(), random)
    for param, weight in zip(group["params"], weights, strict=True):
        assert torch.equal(param, weight)


def test_an_optimizer_that_mixes_parameters_is_refused_with_the_reason() -> None:
    with pytest.raises(OptimizerError, match=r"GloballyClipped steps a parameter differently when others are there"):
        start(config_for(1), make_optimizer=GloballyClipped)


def test_an_unknown_word_of_an_optimizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptimizerError, match=r"granularity is 'row'; it must be 'element' or 'tensor'"):
        start(config_for(1), make_optimizer=type("Says", (Lion,), {"granularity": "row"}))


def halves(given: list[nn.Parameter]) -> Optimizer:
    return Hybrid([{"params": given[::2], "whole": True, "lr": 0.02}, {"params": given[1::2]}])


@pytest.mark.parametrize(
    "make", [Lion, MatrixNormalised, halves, Anchored, AnchoredElements], ids=lambda make: make.__name__
)
def test_a_third_party_optimizer_trains_what_it_trains_on_one_process(make: Any) -> None:
    batches = make_batches(4, 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, make)
        for stage in STAGES:
            engine = start(config_for(stage), make_optimizer=make)
            assert_close(train_engine(engine, batches), expected, rtol=5e-5)

    run_ranks(2, body)
