"""What the kernels are tried with: recipes, dtypes, values of every kind, and the libraries of this machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.kernels import native, recipe as recipes, reference
from zerolith.kernels.arrays import FORMATS, Arrays
from zerolith.kernels.backend import Backend
from zerolith.kernels.recipe import NUM_STATES, Kind, Recipe


def _libraries() -> dict[str, native.Library]:
    """One for each instruction set of this processor; none where nothing was compiled."""
    found = {}
    for name in native.INSTRUCTION_SETS if native.PATH.exists() else ():
        try:
            found[name] = native.load(instruction_set=name)
        except native.UsageError:
            continue
    return found


LIBRARIES = _libraries()


def _adam(**options: object) -> Recipe:
    given = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 3, "decoupled": True}
    return recipes.adam_recipe(**{**given, "grad_factor": 0.37, **options})


def _sgd(**options: object) -> Recipe:
    given = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "step": 2, "lr": 0.1}
    return recipes.sgd_recipe(**{**given, "grad_factor": 0.37, **options})


def _adagrad(**options: object) -> Recipe:
    given = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-10, "step": 4}
    return recipes.adagrad_recipe(**{**given, "grad_factor": 0.37, **options})


RECIPES: dict[str, Recipe] = {
    "adamw": _adam(),
    "adamw, no decay, first step": _adam(weight_decay=0.0, step=1, grad_factor=1.0),
    "adamw, small betas": _adam(betas=(0.4, 0.3)),
    "adam": _adam(decoupled=False),
    "lion": recipes.lion_recipe(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, grad_factor=0.37),
    "lion, small betas": recipes.lion_recipe(lr=1e-3, betas=(0.3, 0.4), weight_decay=0.0, grad_factor=1.0),
    "adagrad": _adagrad(),
    "adagrad, no decay": _adagrad(weight_decay=0.0, step=1),
    "sgd": _sgd(momentum=0.0),
    "sgd, no decay": _sgd(momentum=0.0, weight_decay=0.0),
    "momentum": _sgd(dampening=0.1),
    "momentum, first step": _sgd(dampening=0.1, step=1),
    "nesterov": _sgd(nesterov=True, weight_decay=0.0),
    "nesterov, first step": _sgd(nesterov=True, step=1),
}
TARGETS: dict[str, torch.dtype | None] = {"nothing": None, "split": None} | {str(dtype): dtype for dtype in FORMATS}


class Values(NamedTuple):
    """What an update starts from."""

    master: Tensor
    states: list[Tensor]
    grad: Tensor


def any_bits(numel: int) -> Tensor:
    """fp32 of every kind: subnormal, infinite, NaN, huge, small."""
    return torch.randint(-(2**31), 2**31, (numel,), dtype=torch.int64).to(torch.int32).view(torch.float32)


def ordinary(kind: Kind, numel: int, dtype: torch.dtype) -> Values:
    states = [torch.randn(numel) for _ in range(NUM_STATES[kind])]
    if kind is not Kind.LION and kind is not Kind.MOMENTUM and states:
        states[-1].abs_()
    return Values(torch.randn(numel), states, torch.randn(numel).to(dtype))


def wild(kind: Kind, numel: int, dtype: torch.dtype) -> Values:
    states = [any_bits(numel) for _ in range(NUM_STATES[kind])]
    return Values(any_bits(numel), states, any_bits(numel).to(dtype))


def run(
    backend: Backend, recipe: Recipe, values: Values, target: str, *, part: slice = slice(None), threads: int = 1
) -> list[Tensor]:
    """All arrays after an update of `part` of them by `backend`; `values` stay as they are."""
    master, states, grad = values.master.clone(), [state.clone() for state in values.states], values.grad
    remainder = out = None
    if target == "split":
        whole, master = master, torch.empty_like(master, dtype=torch.bfloat16)
        remainder = torch.empty_like(master, dtype=torch.int16)
        reference.split(whole, master, remainder, threads=1)
    elif target != "nothing":
        out = torch.full_like(master, 3.0, dtype=TARGETS[target])
    arrays = Arrays(
        master=master[part],
        remainder=None if remainder is None else remainder[part],
        states=tuple(state[part] for state in states),
        grad=grad[part],
        out=None if out is None else out[part],
    )
    backend.update(recipe, arrays, threads=threads)
    return [each for each in (master, remainder, *states, out) if each is not None]


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bit by bit; a NaN equals any NaN."""
    if not left.dtype.is_floating_point:
        return torch.equal(left, right)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return bool(((left.view(integer) == right.view(integer)) | (left.isnan() & right.isnan())).all())


def all_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(same(mine, other) for mine, other in zip(left, right, strict=True))
