"""fp32 master weights kept as the bf16 weights that the model computes with, and the 16 bits that these lack.

[Note: split] 4 bytes in place of 6: the weights are no second copy. With the bits of an fp32 number as an integer, the
remainder is the lower half, read as signed, and the weight the upper half after 0x8000 has been added; joining adds
the remainder back. That is exact for every number and infinity. A NaN becomes the NaN (0x7fc0, 0).

The weight is the nearest bf16, as a cast makes it, but for numbers that lie midway between two: a cast goes to the
even one, this away from zero. It has no choice: 65,537 fp32 numbers would round to each even bf16, one more than 16
bits of remainder can tell apart. One number in 131,072 is such a tie, and either neighbour is as near. As with a cast,
numbers above the largest bf16 by half a unit or more have the weight infinity, and are still joined exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zerolith.kernels.arrays import SplitMaster, check, count_writes
from zerolith.kernels.backend import backend_for, num_threads


@torch.no_grad()
def split(master: Tensor, *, threads: int | None = None) -> SplitMaster:
    """The two halves of an fp32 tensor, in its shape."""
    check({"master": (master, (torch.float32,))})
    weight = torch.empty_like(master, dtype=torch.bfloat16, requires_grad=False)
    remainder = torch.empty_like(master, dtype=torch.int16, requires_grad=False)
    backend_for(master.device).split(master, weight, remainder, threads=num_threads(threads))
    return SplitMaster(weight, remainder)


@torch.no_grad()
def join(halves: SplitMaster, *, out: Tensor | None = None, threads: int | None = None) -> Tensor:
    """The fp32 tensor that was split: `out` if given, else a new one."""
    weight, remainder = halves
    master = torch.empty_like(weight, dtype=torch.float32, requires_grad=False) if out is None else out
    check(
        {
            "weight": (weight, (torch.bfloat16,)),
            "remainder": (remainder, (torch.int16,)),
            "out": (master, (torch.float32,)),
        }
    )
    backend_for(weight.device).join(master, weight, remainder, threads=num_threads(threads))
    count_writes([master])
    return master
