"""Whole tensors from the pieces that ranks have saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.records import StoredTensor
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range


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


def check(sources: Sequence[StoredTensor | None], pieces: Sequence[Piece], *, what: str) -> None:
    """Raise CheckpointError unless each rank has its piece."""
    for rank, part in pieces:
        source = sources[rank] if rank < len(sources) else None
        if source is None:
            raise CheckpointDamagedError(f"{what}: rank {rank} has saved nothing of it")
        if len(source.shape) != 1 or source.numel < part.stop:
            raise source.damaged(f"elements {part.start} to {part.stop} in it should be {what}")


def gather(
    sources: Sequence[StoredTensor | None], pieces: Sequence[Piece], *, shape: tuple[int, ...], what: str
) -> Tensor:
    """The whole tensor of which `sources`, by rank, hold the pieces. Raises CheckpointError."""
    check(sources, pieces, what=what)
    present = [(source, part) for rank, part in pieces if (source := sources[rank]) is not None]
    dtype = present[0][0].dtype if present else torch.float32
    whole = torch.empty(math.prod(shape), dtype=dtype)
    start = 0
    for source, part in present:
        source.read_into(whole[start : start + part.numel], part)
        start += part.numel
    if start != whole.numel():
        raise CheckpointDamagedError(f"{what}: {whole.numel()} elements are needed, and the ranks have {start}")
    return whole.view(shape)


def reshaped(source: StoredTensor, *, shape: tuple[int, ...], what: str) -> Tensor:
    """A tensor that is whole in one file. Raises CheckpointError if it has not as many elements as the shape."""
    if source.numel != math.prod(shape):
        raise source.damaged(f"it should be {what}, of shape {list(shape)}")
    return source.load().view(shape)


def refuse(*, what: str, why: str) -> Tensor:
    """In the place of a tensor that cannot be made whole."""
    raise CheckpointError(f"{what} {why}")
