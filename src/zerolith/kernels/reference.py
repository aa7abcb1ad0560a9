"""The recipe in elementary torch operations, each of which rounds once: what every other implementation must equal.

It serves where there is no compiled library, on any device. Arrays are worked through in slices, so that the
intermediate results stay small. See [Note: recipe], [Note: square sums] and [Note: split].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zerolith.kernels.arrays import CHUNK, Arrays
from zerolith.kernels.recipe import Kind, Recipe, toward
from zerolith.layout import BLOCK

SLICE = 4 * CHUNK
LANES = 16  # of a block: each adds the squares of every 16th element
NAN = 0x7FC00000


def update(recipe: Recipe, arrays: Arrays, *, threads: int) -> None:
    """One step on whole arrays; torch decides on the threads."""
    flat = [each.detach().view(-1) for each in (arrays.master, arrays.grad, *arrays.states)]
    remainder = arrays.remainder.view(-1) if arrays.remainder is not None else None
    out = arrays.out.detach().view(-1) if arrays.out is not None else None
    for part in _slices(arrays.master.numel()):
        master, grad, *states = (each[part] for each in flat)
        weight = master if remainder is None else _joined(master, remainder[part])
        weight = RULES[recipe.kind](recipe, weight, grad.float().mul(recipe.grad_factor), *states)
        if remainder is not None:
            _put_split(weight, master, remainder[part])
        else:
            master.copy_(weight)
        if out is not None:
            out[part].copy_(weight)


def _adamw(k: Recipe, weight: Tensor, grad: Tensor, average: Tensor, square: Tensor) -> Tensor:
    return _adam(k, weight.mul(k.decay), grad, average, square)


def _adam_l2(k: Recipe, weight: Tensor, grad: Tensor, average: Tensor, square: Tensor) -> Tensor:
    return _adam(k, weight, _with_decay(k, grad, weight), average, square)


def _adam(k: Recipe, weight: Tensor, grad: Tensor, average: Tensor, square: Tensor) -> Tensor:
    average.copy_(_lerp(average, grad, k.first_gain))
    square.mul_(k.second_keep).add_(grad.mul(k.second_gain).mul_(grad))
    return weight.sub(average.mul(k.rate).div_(_root(square).add_(k.eps)))


def _lion(k: Recipe, weight: Tensor, grad: Tensor, average: Tensor) -> Tensor:
    direction = average.mul(k.first_keep).add_(grad.mul(k.first_gain)).sign_()
    average.copy_(_lerp(average, grad, k.second_gain))
    return weight.mul(k.decay).sub_(direction.mul_(k.rate))


def _adagrad(k: Recipe, weight: Tensor, grad: Tensor, square: Tensor) -> Tensor:
    grad = _with_decay(k, grad, weight)
    square.add_(grad.mul(grad))
    return weight.sub(grad.mul(k.rate).div_(_root(square).add_(k.eps)))


def _sgd(k: Recipe, weight: Tensor, grad: Tensor) -> Tensor:
    return weight.sub(_with_decay(k, grad, weight).mul(k.rate))


def _momentum(k: Recipe, weight: Tensor, grad: Tensor, momentum: Tensor) -> Tensor:
    grad = _with_decay(k, grad, weight)
    momentum.copy_(grad if k.is_first else momentum.mul(k.first_keep).add_(grad.mul(k.first_gain)))
    step = grad.add(momentum.mul(k.first_keep)) if k.is_nesterov else momentum
    return weight.sub(step.mul(k.rate))


RULES: dict[Kind, Callable[..., Tensor]] = {  # (recipe, weight, fp32 gradient, *states) -> new weight
    Kind.ADAMW: _adamw,
    Kind.ADAM_L2: _adam_l2,
    Kind.LION: _lion,
    Kind.ADAGRAD: _adagrad,
    Kind.SGD: _sgd,
    Kind.MOMENTUM: _momentum,
}


def _lerp(start: Tensor, end: Tensor, gain: float) -> Tensor:
    return torch.add(start if gain < 0.5 else end, end.sub(start).mul_(toward(gain)))


def _root(square: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt of fp32 is not on the CPU: MKL's may be off by one in the last place.

    In fp64 an error of one there lies too far from the middle between two fp32 numbers to matter: such a middle m has
    25 bits, so |x - m^2| is 2^-48 or more for x in [1, 4) with 24 bits, and sqrt(x) is four fp64 units away from m.
    """
    return square.double().sqrt_().float()


def _with_decay(k: Recipe, grad: Tensor, weight: Tensor) -> Tensor:
    return grad.add(weight.mul(k.weight_decay)) if k.weight_decay else grad


def square_sums(values: Tensor, blocks: Tensor, *, threads: int) -> None:
    """The sums of squares of the blocks of `values`."""
    flat = values.detach().view(-1)
    for part in _slices(len(flat)):
        squares = _by_block(flat[part])
        blocks[part.start // BLOCK : part.start // BLOCK + len(squares)] = squares


def add(target: Tensor, terms: Sequence[Tensor], blocks: Tensor | None, *, fresh: bool, threads: int) -> None:
    """The sum of `terms`, or of `target` and them, to `target`; the square sums of its blocks to `blocks`."""
    flat, *rest = (each.detach().view(-1) for each in (target, *terms))
    for part in _slices(len(flat)):
        left = [each[part] for each in rest]
        if fresh:
            flat[part].copy_(left.pop(0))
        for term in left:
            flat[part].add_(term.float())  # torch adds mixed dtypes element by element on the CPU: 3x slower
    if blocks is not None:
        square_sums(target, blocks, threads=threads)


def _by_block(values: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(values.double(), (0, -len(values) % BLOCK)).view(-1, BLOCK // LANES, LANES)
    lanes = torch.zeros_like(rows[:, 0])
    for row in rows.square_().unbind(dim=1):
        lanes.add_(row)
    while lanes.shape[1] > 1:
        near, far = lanes.chunk(2, dim=1)
        lanes = near + far
    return lanes[:, 0]


def split(master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
    """Write both halves of `master`."""
    flat = [each.detach().view(-1) for each in (master, weight, remainder)]
    for part in _slices(master.numel()):
        _put_split(*(each[part] for each in flat))


def join(master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
    """Write `master` from both halves."""
    flat = [each.detach().view(-1) for each in (master, weight, remainder)]
    for part in _slices(master.numel()):
        whole, upper, lower = (each[part] for each in flat)
        whole.copy_(_joined(upper, lower))


def _joined(weight: Tensor, remainder: Tensor) -> Tensor:
    return (weight.view(torch.int16).int().bitwise_left_shift_(16) + remainder.int()).view(torch.float32)


def _put_split(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    bits = torch.where(master.isnan(), NAN, master.view(torch.int32))
    remainder.copy_(bits)  # keeps the lower half, as a signed number
    weight.view(torch.int16).copy_((bits + 0x8000).bitwise_right_shift_(16))


def _slices(numel: int) -> Iterator[slice]:
    for start in range(0, numel, SLICE):
        yield slice(start, min(start + SLICE, numel))
