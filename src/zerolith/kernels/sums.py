"""The square sum of a gradient, alone or while it arrives; infinite or NaN if, and only if, the gradient is.

[Note: square sums] The order of additions is fixed, so the result is the same bit by bit whatever the number of
threads, the instruction set or the implementation. Squares are taken in fp64, where those of fp32 numbers are exact
and never overflow. A block is 256 elements, the last one filled up with zeros. In a block lane j (0 to 15) adds the
squares of elements j, j + 16, ... in this order, then lane j adds lane j + 8, j + 4, j + 2 and j + 1. The sums of 256
blocks are added in order to that of a chunk, and those of the chunks to the total.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.errors import UsageError
from zerolith.kernels.arrays import BLOCK, FORMATS, check, count_writes
from zerolith.kernels.backend import backend_for, num_threads


class SquareSum(NamedTuple):
    """What one pass over a gradient tells."""

    total: float  # of the squares; inf or nan if not finite
    finite: bool  # every element is


@torch.no_grad()
def square_sum(grad: Tensor, *, blocks: Tensor | None = None, threads: int | None = None) -> SquareSum:
    """The square sum of an fp32, bf16 or fp16 tensor; that of every 256 elements goes to `blocks` (fp64), if given."""
    check({"grad": (grad, FORMATS)})
    _check_blocks(blocks, grad)
    total = backend_for(grad.device).square_sum(grad, blocks, threads=num_threads(threads))
    count_writes([] if blocks is None else [blocks])
    return SquareSum(total, math.isfinite(total))


@torch.no_grad()
def accumulate(target: Tensor, grad: Tensor, *, blocks: Tensor | None = None, threads: int | None = None) -> SquareSum:
    """Add an fp32, bf16 or fp16 tensor to an fp32 one, each sum rounded once; returns the square sum of the result."""
    check({"target": (target, (torch.float32,)), "grad": (grad, FORMATS)})
    _check_blocks(blocks, grad)
    total = backend_for(grad.device).accumulate(target, grad, blocks, threads=num_threads(threads))
    count_writes([target] if blocks is None else [target, blocks])
    return SquareSum(total, math.isfinite(total))


def _check_blocks(blocks: Tensor | None, grad: Tensor) -> None:
    if blocks is None:
        return
    check({"blocks": (blocks, (torch.float64,))})
    needed = -(-grad.numel() // BLOCK)
    if blocks.numel() != needed or blocks.device != grad.device:
        raise UsageError(
            f"blocks has {blocks.numel()} elements on {blocks.device}; {needed} on {grad.device} are needed, one for "
            f"each {BLOCK} of the gradient"
        )
