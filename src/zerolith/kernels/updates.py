"""Optimizer steps in one pass over memory: gradient in, states and master changed, weights out.

Gradients are fp32, bf16 or fp16; master and states fp32; all of them contiguous, on one device, of one number of
elements, and apart in memory. `grad_factor` multiplies the gradient on the way (loss scale undone, times clipping).
`out`, where given, gets the new weights in its own dtype, fp32, bf16 or fp16. The master may be a SplitMaster.
`threads` are as many as torch uses unless told. The result is the same bit by bit whatever the number of threads, the
instruction set or the implementation: see [Note: recipe]. Nothing here communicates. Wrong arguments raise UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zerolith.errors import UsageError
from zerolith.kernels import recipe as recipes
from zerolith.kernels.arrays import Arrays, SplitMaster, count_writes
from zerolith.kernels.backend import backend_for, num_threads


def adamw(
    master: Tensor | SplitMaster,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_factor: float = 1.0,
    decoupled: bool = True,
    out: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Step number `step` (from 1) of AdamW; of Adam, with the decay in the gradient, if not `decoupled`."""
    recipe = recipes.adam_recipe(
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step, grad_factor=grad_factor, decoupled=decoupled
    )
    _run(recipe, master, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, grad, out, threads)


def lion(
    master: Tensor | SplitMaster,
    exp_avg: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    grad_factor: float = 1.0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """A step of `zerolith.optim.Lion`."""
    recipe = recipes.lion_recipe(lr=lr, betas=betas, weight_decay=weight_decay, grad_factor=grad_factor)
    _run(recipe, master, {"exp_avg": exp_avg}, grad, out, threads)


def adagrad(
    master: Tensor | SplitMaster,
    state_sum: Tensor,
    grad: Tensor,
    *,
    lr: float,
    step: int,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    grad_factor: float = 1.0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Step number `step` (from 1) of Adagrad; `step` matters for `lr_decay` only."""
    recipe = recipes.adagrad_recipe(
        lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, step=step, grad_factor=grad_factor
    )
    _run(recipe, master, {"state_sum": state_sum}, grad, out, threads)


def sgd(
    master: Tensor | SplitMaster,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    *,
    lr: float,
    step: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_factor: float = 1.0,
    out: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Step number `step` (from 1) of SGD. The first step with momentum sets `momentum_buffer` to the gradient."""
    recipe = recipes.sgd_recipe(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        step=step,
        grad_factor=grad_factor,
    )
    if (momentum_buffer is None) != (momentum == 0):
        raise UsageError(f"momentum_buffer: needed with a momentum and only then; momentum is {momentum}")
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    _run(recipe, master, states, grad, out, threads)


@torch.no_grad()
def _run(
    recipe: recipes.Recipe,
    master: Tensor | SplitMaster,
    states: Mapping[str, Tensor],
    grad: Tensor,
    out: Tensor | None,
    threads: int | None,
) -> None:
    arrays = Arrays.checked(master, states, grad, out)
    backend_for(grad.device).update(recipe, arrays, threads=num_threads(threads))
    count_writes(arrays.written)
