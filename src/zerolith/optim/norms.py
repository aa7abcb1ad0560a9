"""The global gradient norm, overflow and use of every parameter: one pass over the shards, two small collectives.

[Note: exact sums] The square norm is a sum of one term per block of the layout (see [Note: blocks]). Adding them in
fp64 would depend on how blocks lie over ranks and buckets. So each term is first rounded to a multiple of a unit
chosen from the largest term, which makes every partial sum exact and the order irrelevant; the remainders are added
the same way with a smaller unit. With n blocks the result is within n**3 * 2**-105 of the largest term.
(Demmel and Nguyen, "Fast reproducible floating-point summation", ARITH 2013, with two bins.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.comm import Comm
from zerolith.gradients import Gradients
from zerolith.layout import BLOCK

MANTISSA = 52


class GradientFacts(NamedTuple):
    """What all ranks know about this step's gradient sum, before any scaling."""

    norm: float  # 2-norm of the sum over ranks and micro-batches; inf if not finite
    overflow: bool
    used: list[list[bool]]  # per section, per parameter: some rank had a gradient for it
    late: list[bool]  # per section: some rank has a gradient of it that is not in the sum yet; nothing else is right
    culprit: str  # the first parameter that is not finite, and the rank that holds it; "" if all are


def examine(
    gradients: Sequence[Gradients], comm: Comm, *, late: Sequence[bool] = (), fingerprint: bool = False
) -> GradientFacts:
    """Norm, overflow and use, equal on every rank, and for which sections one of them is `late`.

    Collective. With `fingerprint`, ranks also compare the collectives that they have issued so far.
    Raises CollectiveMismatchError on every rank if they differ.
    """
    squares = [own.squares for own in gradients]
    highest = _numbers([square.max() for square in squares if square.numel()])
    largest = max((each if math.isfinite(each) else math.inf for each in highest), default=0.0)
    flags = [float(used) for own in gradients for used in own.used]
    print_ = float(comm.journal.fingerprint) if fingerprint else 0.0
    largest, high, low, *flags = comm.max([largest, print_, -print_, *flags, *map(float, late)], name="gradient facts")
    comm.check_journals(high, low, name="collective journals")
    left = iter(flags)
    used = [[flag > 0 for flag in islice(left, len(own.used))] for own in gradients]
    is_late = [flag > 0 for flag in left]
    if not math.isfinite(largest):
        return GradientFacts(math.inf, True, used, is_late, _culprit(gradients, squares, comm))
    blocks = sum(slot.padded.numel for own in gradients for slot in own.section.layout.slots) // BLOCK
    total = sum(comm.sum(_exact_parts(squares, largest, blocks), name="gradient norm"))
    return GradientFacts(math.sqrt(total), False, used, is_late, "")


def _exact_parts(squares: Sequence[Tensor], largest: float, blocks: int) -> list[float]:
    """This rank's sum in two parts, coarse and fine; both may be added over ranks in any order without rounding."""
    growth = max(blocks, 1).bit_length()  # a sum of `blocks` terms is under 2**growth of the largest
    unit = math.ldexp(1.0, math.frexp(largest)[1] + growth - MANTISSA)
    parts = []
    rest = list(squares)
    for _ in range(2):
        magic = 1.5 * math.ldexp(unit, MANTISSA)  # adding it rounds to a multiple of `unit`
        rounded = [(square + magic) - magic for square in rest]
        parts.append(sum(_numbers([part.sum() for part in rounded])))
        rest = [square - part for square, part in zip(rest, rounded, strict=True)]
        unit = math.ldexp(unit, growth - MANTISSA)
    return parts


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """All of them in one read: each read of a device waits for it. They may lie on several."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []


def _culprit(gradients: Sequence[Gradients], squares: Sequence[Tensor], comm: Comm) -> str:
    mine = ""
    for own, square in zip(gradients, squares, strict=True):
        bad = torch.nonzero(~torch.isfinite(square))
        if len(bad):
            layout = own.section.layout
            element = layout.shard(comm.rank).start + int(bad[0]) * BLOCK
            index = max(index for index, slot in enumerate(layout.slots) if slot.start <= element)
            mine = f"{own.section.members[index].name} (shard of rank {comm.rank})"
            break
    names = comm.all_gather_bytes(mine.encode(), name="parameter that overflowed")
    return next((name.decode() for name in names if name), "")
