"""Adding gradients in a fixed order, and their square sums, alone or in the same pass.

[Note: square sums] The order of additions is fixed, so the result is the same bit by bit whatever the number of
threads, the instruction set or the implementation. Squares are taken in fp64, where those of fp32 numbers are exact
and never overflow: a sum is infinite or NaN if, and only if, an element is. A block is 256 elements, the last one
filled up with zeros. In a block lane j (0 to 15) adds the squares of elements j, j + 16, ... in this order, then lane j
adds lane j + 8, j + 4, j + 2 and j + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerolith.errors import UsageError
from zerolith.kernels.arrays import FORMATS, check, count_writes
from zerolith.kernels.backend import backend_for, num_threads
from zerolith.layout import BLOCK


@torch.no_grad()
def square_sums(values: Tensor, *, threads: int | None = None) -> Tensor:
    """(blocks,) fp64: the square sum of every 256 elements of an fp32, bf16 or fp16 tensor."""
    check({"values": (values, FORMATS)})
    blocks = torch.empty(-(-values.numel() // BLOCK), dtype=torch.float64, device=values.device)
    backend_for(values.device).square_sums(values, blocks, threads=num_threads(threads))
    return blocks


@torch.no_grad()
def add(
    target: Tensor,
    terms: Sequence[Tensor],
    *,
    fresh: bool = False,
    blocks: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """target = terms[0] + terms[1] + ... (fresh), or target += terms[0], += terms[1], ..., from the left.

    target: fp32. terms: of one dtype, fp32, bf16 or fp16; each addition is rounded once. blocks: (blocks,) fp64, gets
    the square sums of the result.
    """
    if not terms:
        raise UsageError("terms: there is none to add")
    others = {f"terms[{index}]": (term, (terms[0].dtype,)) for index, term in enumerate(terms) if index}
    check({"target": (target, (torch.float32,)), "terms[0]": (terms[0], FORMATS), **others})
    if blocks is not None:
        _check_blocks(blocks, target)
    backend_for(target.device).add(target, terms, blocks, fresh=fresh, threads=num_threads(threads))
    count_writes([target] if blocks is None else [target, blocks])


def _check_blocks(blocks: Tensor, target: Tensor) -> None:
    check({"blocks": (blocks, (torch.float64,))})
    needed = -(-target.numel() // BLOCK)
    if blocks.numel() != needed or blocks.device != target.device:
        raise UsageError(
            f"blocks has {blocks.numel()} elements on {blocks.device}; {needed} on {target.device} are needed, one for "
            f"each {BLOCK} of the target"
        )
