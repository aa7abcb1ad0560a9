"""The recipe in Triton, for CUDA tensors: one kernel per pass. Imported only where Triton is installed.

[Note: exact Triton] By default Triton fuses multiplications with additions, divides and takes roots approximately, and
has libdevice flush subnormal numbers. EXACT and the functions that end in _rn forbid all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zerolith.kernels.arrays import Arrays
from zerolith.kernels.recipe import NUM_STATES, Kind, Recipe, toward
from zerolith.layout import BLOCK

EXACT: dict[str, Any] = {"enable_fp_fusion": False, "enable_reflect_ftz": False}  # options of a launch
TILE = 1024  # elements of a program
TILE_BLOCKS = 8  # blocks of a program that adds
LANES = 16

_ADAMW, _LION = tl.constexpr(int(Kind.ADAMW)), tl.constexpr(int(Kind.LION))
_ADAGRAD, _MOMENTUM = tl.constexpr(int(Kind.ADAGRAD)), tl.constexpr(int(Kind.MOMENTUM))


@triton.jit
def _lerp(start, end, gain, gain_toward):
    return tl.where(gain < 0.5, start, end) + (end - start) * gain_toward


@triton.jit
def _widen(x):  # spelled out for bf16: Triton's interpreter flushes its subnormal numbers
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _join(weight, remainder):
    bits = (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    return ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.int16)


@triton.jit
def _to_bf16(x):  # spelled out, for Triton's interpreter truncates
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update(
    grads, masters, remainders, firsts, seconds, outs, numel,
    grad_factor, weight_decay, decay, first_keep, first_gain, second_keep, second_gain, eps, rate,
    first_toward, second_toward,
    KIND: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, IS_FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    IS_SPLIT: tl.constexpr, HAS_OUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < numel
    grad = _widen(tl.load(grads + at, mask=inside)) * grad_factor
    weight = tl.load(masters + at, mask=inside)
    if IS_SPLIT:
        weight = _join(weight, tl.load(remainders + at, mask=inside))
    if STATES > 0:
        first = tl.load(firsts + at, mask=inside)
    if KIND == _ADAMW:
        weight = weight * decay
    elif DECAYS:
        grad = grad + weight * weight_decay
    if STATES == 2:  # both kinds of Adam
        second = tl.load(seconds + at, mask=inside)
        first = _lerp(first, grad, first_gain, first_toward)
        second = second * second_keep + grad * second_gain * grad
        weight = weight - tl.div_rn(first * rate, tl.sqrt_rn(second) + eps)
        tl.store(seconds + at, second, mask=inside)
    elif KIND == _LION:
        mixed = first * first_keep + grad * first_gain
        direction = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
        weight = weight * decay - direction * rate
        first = _lerp(first, grad, second_gain, second_toward)
    elif KIND == _ADAGRAD:
        first = first + grad * grad
        weight = weight - tl.div_rn(grad * rate, tl.sqrt_rn(first) + eps)
    elif KIND == _MOMENTUM:
        if IS_FIRST:
            first = grad
        else:
            first = first * first_keep + grad * first_gain
        if NESTEROV:
            weight = weight - (grad + first * first_keep) * rate
        else:
            weight = weight - first * rate
    else:
        weight = weight - grad * rate
    if STATES > 0:
        tl.store(firsts + at, first, mask=inside)
    if IS_SPLIT:
        upper, lower = _split(weight)
        tl.store(masters + at, upper, mask=inside)
        tl.store(remainders + at, lower, mask=inside)
    else:
        tl.store(masters + at, weight, mask=inside)
    if HAS_OUT:
        if outs.dtype.element_ty == tl.bfloat16:
            tl.store(outs + at, _to_bf16(weight), mask=inside)
        else:
            tl.store(outs + at, weight.to(outs.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCKS, WIDTH) -> its left and its right half."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCKS, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _sums(
    values, targets, squares, numel,
    WRITES: tl.constexpr, ADDS: tl.constexpr, SQUARES: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    lanes = tl.zeros((BLOCKS, LANES), tl.float64)
    for row in range(256 // LANES):
        at = blocks[:, None] * 256 + row * LANES + tl.arange(0, LANES)[None, :]
        inside = at < numel
        x = _widen(tl.load(values + at, mask=inside, other=0.0))
        if ADDS:
            x = tl.load(targets + at, mask=inside, other=0.0) + x
        if WRITES:
            tl.store(targets + at, x, mask=inside)
        if SQUARES:
            wide = x.to(tl.float64)
            lanes = lanes + wide * wide
    if SQUARES:
        near, far = _halves(lanes, BLOCKS, 16)
        near, far = _halves(near + far, BLOCKS, 8)
        near, far = _halves(near + far, BLOCKS, 4)
        near, far = _halves(near + far, BLOCKS, 2)
        total = tl.reshape(near + far, (BLOCKS,))
        tl.store(squares + blocks, total, mask=blocks * 256 < numel)


@triton.jit
def _split_all(masters, weights, remainders, numel, JOINS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < numel
    if JOINS:
        whole = _join(tl.load(weights + at, mask=inside), tl.load(remainders + at, mask=inside))
        tl.store(masters + at, whole, mask=inside)
    else:
        upper, lower = _split(tl.load(masters + at, mask=inside))
        tl.store(weights + at, upper, mask=inside)
        tl.store(remainders + at, lower, mask=inside)


def update(recipe: Recipe, arrays: Arrays, *, threads: int) -> None:
    """One step on whole arrays."""
    numel = arrays.master.numel()
    if numel == 0:
        return
    states = [*arrays.states, arrays.master, arrays.master]  # stand-ins are never touched
    absent = arrays.master
    k = recipe
    _update[(triton.cdiv(numel, TILE),)](
        arrays.grad, arrays.master, absent if arrays.remainder is None else arrays.remainder, states[0], states[1],
        absent if arrays.out is None else arrays.out, numel,
        k.grad_factor, k.weight_decay, k.decay, k.first_keep, k.first_gain, k.second_keep, k.second_gain, k.eps, k.rate,
        toward(k.first_gain), toward(k.second_gain),
        KIND=int(k.kind), STATES=NUM_STATES[k.kind], DECAYS=k.weight_decay != 0, IS_FIRST=k.is_first,
        NESTEROV=k.is_nesterov, IS_SPLIT=arrays.remainder is not None, HAS_OUT=arrays.out is not None, TILE=TILE,
        **EXACT,
    )  # fmt: skip


def square_sums(values: Tensor, blocks: Tensor, *, threads: int) -> None:
    """The sums of squares of the blocks of `values`. Does not wait for the device."""
    _sum(values, None, blocks, adds=False)


def add(target: Tensor, terms: Sequence[Tensor], blocks: Tensor | None, *, fresh: bool, threads: int) -> None:
    """The sum of `terms`, or of `target` and them, to `target`; the square sums of its blocks to `blocks`."""
    for number, term in enumerate(terms):
        is_last = number == len(terms) - 1
        _sum(term, target, blocks if is_last else None, adds=not fresh or number > 0)


def _sum(values: Tensor, target: Tensor | None, blocks: Tensor | None, *, adds: bool) -> None:
    numel = values.numel()
    if numel:
        _sums[(triton.cdiv(numel, BLOCK * TILE_BLOCKS),)](
            values, values if target is None else target, values if blocks is None else blocks, numel,
            WRITES=target is not None, ADDS=adds, SQUARES=blocks is not None, BLOCKS=TILE_BLOCKS, LANES=LANES, **EXACT,
        )  # fmt: skip


def split(master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
    """Write both halves of `master`."""
    _convert(master, weight, remainder, joins=False)


def join(master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
    """Write `master` from both halves."""
    _convert(master, weight, remainder, joins=True)


def _convert(master: Tensor, weight: Tensor, remainder: Tensor, *, joins: bool) -> None:
    numel = master.numel()
    if numel:
        grid = (triton.cdiv(numel, TILE),)
        _split_all[grid](master, weight, remainder, numel, JOINS=joins, TILE=TILE, **EXACT)
