"""Whole tensors from the pieces that ranks have saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.records import StoredTensor
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The whole tensor that is asked for."""

    where: Path  # the file, or that of rank 0
    parameter: str
    state: str | None = None  # None: its value
    shape: tuple[int, ...]

    def __str__(self) -> str:
        owner = f"the parameter {self.parameter!r} of shape {list(self.shape)}"
        return owner if self.state is None else f"{self.state!r} of {owner}"


class Piece(NamedTuple):
    """Elements of a rank's flat tensor. A parameter is its pieces one after the other."""

    rank: int
    range: Range


def cut(span: Range, *, partition: int) -> list[Piece]:
    """The pieces of a span of a flat group that is cut into partitions of equal size, one a rank (stages 1 and 2)."""
    if not span.numel:
        return []
    ranks = range(span.start // partition, -(-span.stop // partition)) if partition else range(0)
    starts = [(rank, rank * partition) for rank in ranks]
    return [Piece(rank, span.clip(Range(start, start + partition)).shift(-start)) for rank, start in starts]


def split(numel: int, *, offset: int, num_ranks: int) -> list[Piece]:
    """The pieces of a parameter of which each rank has an equal part, all at one offset (stage 3)."""
    part = -(-numel // num_ranks)
    owned = [Range(rank * part, (rank + 1) * part).clip(Range(0, numel)) for rank in range(num_ranks)]
    return [Piece(rank, Range(offset, offset + each.numel)) for rank, each in enumerate(owned) if each.numel]


def check(sources: Sequence[StoredTensor | None], pieces: Sequence[Piece], wanted: Wanted) -> None:
    """Raise CheckpointError unless each rank has its piece."""
    for rank, part in pieces:
        source = sources[rank] if rank < len(sources) else None
        if source is None:
            raise CheckpointDamagedError(f"{wanted.where}: rank {rank} has saved nothing of {wanted}")
        if len(source.shape) != 1 or source.numel < part.stop:
            raise source.damaged(f"elements {part.start} to {part.stop} in it should be {wanted}")


def gather(sources: Sequence[StoredTensor | None], pieces: Sequence[Piece], wanted: Wanted) -> Tensor:
    """The whole tensor of which `sources`, by rank, hold the pieces. Raises CheckpointError."""
    check(sources, pieces, wanted)
    present = [(source, part) for rank, part in pieces if (source := sources[rank]) is not None]
    dtype = present[0][0].dtype if present else torch.float32
    held = sum(part.numel for _, part in present)
    if held != math.prod(wanted.shape):
        raise CheckpointDamagedError(f"{wanted.where}: the ranks have {held} elements of {wanted}")
    whole = torch.empty(held, dtype=dtype)
    start = 0
    for source, part in present:
        source.read_into(whole[start : start + part.numel], part)
        start += part.numel
    return whole.view(wanted.shape)


def reshaped(source: StoredTensor, wanted: Wanted) -> Tensor:
    """A tensor that is whole in one file. Raises CheckpointError if it has not as many elements as it should."""
    if source.numel != math.prod(wanted.shape):
        raise source.damaged(f"it should be {wanted}")
    return source.load().view(wanted.shape)


def refuse(wanted: Wanted, *, why: str) -> Tensor:
    """In the place of a tensor that cannot be made whole."""
    raise CheckpointError(f"{wanted.where}: {wanted} {why}")
