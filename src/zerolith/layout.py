"""Where each tensor lives in one flat buffer, and which range of it each rank owns.

Integers only: no tensors, no processes.

[Note: blocks] Every slot starts at a multiple of BLOCK elements and every shard is cut at one. So a block
holds elements of one tensor only and belongs to one rank only, whatever the number of ranks and whichever
tensors share the buffer. Norms are sums over blocks; that makes them the same bits at every world size,
bucket size and stage. The gaps are zero and stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 256  # elements


class Range(NamedTuple):
    """Half-open range of elements."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def clip(self, other: Range) -> Range:
        """The part of this range that lies in `other`; empty (start == stop) if there is none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def shift(self, offset: int) -> Range:
        return Range(self.start + offset, self.stop + offset)


class Box(NamedTuple):
    """A hyper-rectangle of a tensor, and where its first element lies in the flattened tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor's place in a flat buffer."""

    shape: tuple[int, ...]
    start: int  # elements from the head of the buffer; a multiple of BLOCK
    group: int  # index of the optimizer's param group; -1 for none

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> Range:
        """The tensor's elements."""
        return Range(self.start, self.start + self.numel)

    @property
    def padded(self) -> Range:
        """The tensor's elements and the zeros up to the next block."""
        return Range(self.start, self.start + BLOCK * -(-self.numel // BLOCK))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A flat buffer of `num_shards` equal ranges, one per rank, holding every slot in order."""

    slots: tuple[Slot, ...]
    shard_numel: int
    num_shards: int

    @property
    def numel(self) -> int:
        return self.shard_numel * self.num_shards

    @property
    def whole(self) -> Range:
        return Range(0, self.numel)

    def shard(self, rank: int) -> Range:
        """The range that `rank` owns."""
        return Range(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def owned(self, index: int, rank: int) -> Range:
        """The part of slot `index` that `rank` owns, in elements from the head of the slot."""
        slot = self.slots[index]
        return slot.span.clip(self.shard(rank)).shift(-slot.start)

    def gaps(self) -> list[Range]:
        """The ranges that hold no tensor's elements."""
        stops = [0, *(slot.span.stop for slot in self.slots)]
        starts = [*(slot.start for slot in self.slots), self.numel]
        return [gap for gap in map(Range, stops, starts) if gap.numel]

    def group_ranges(self) -> list[tuple[int, Range]]:
        """(param group, range) for each run of neighbouring slots of one group, gaps included."""
        return [run for run in merge_runs((slot.group, slot.padded) for slot in self.slots) if run[1].numel]


def merge_runs(parts: Iterable[tuple[int, Range]]) -> list[tuple[int, Range]]:
    """Neighbouring ranges of one key as one range."""
    runs: list[tuple[int, Range]] = []
    for key, part in parts:
        start = runs.pop()[1].start if runs and runs[-1][0] == key else part.start
        runs.append((key, Range(start, part.stop)))
    return runs


def plan_layout(shapes: Sequence[Sequence[int]], *, num_shards: int, groups: Sequence[int] = ()) -> Layout:
    """Lay tensors of these shapes one after the other, and cut the buffer into equal shards.

    `groups[i]` is the param group of tensor i; tensors of one group should be neighbours.
    """
    slots, cursor = [], 0
    for index, shape in enumerate(shapes):
        slot = Slot(shape=tuple(shape), start=cursor, group=groups[index] if groups else -1)
        slots.append(slot)
        cursor = slot.padded.stop
    # At least a block each: no buffer is empty, not even one of tensors without elements.
    shard_numel = max(-(-cursor // (num_shards * BLOCK)), 1) * BLOCK
    return Layout(slots=tuple(slots), shard_numel=shard_numel, num_shards=num_shards)


def assign_owners(shapes: Sequence[Sequence[int]], loads: list[float]) -> list[int]:
    """Give each tensor to a rank, heaviest first to the least loaded; `loads`, one number a rank, is updated.

    The weight of a matrix is what an orthogonalisation or a preconditioner costs: rows x columns x the smaller.
    """
    costs = [math.prod(shape) * (min(shape) if len(shape) > 1 else 1) for shape in shapes]
    owners = [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=costs.__getitem__, reverse=True):
        owners[index] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def boxes(shape: tuple[int, ...], flat: Range) -> list[Box]:
    """Hyper-rectangles that tile the flat range of a row-major tensor: at most 2 * ndim - 1 of them."""
    if not flat.numel:
        return []
    if not shape:
        return [Box((), (), 0)]
    tail = shape[1:]
    row = math.prod(tail)
    first, last = -(-flat.start // row), flat.stop // row  # whole rows [first, last)
    if first > last:
        return _in_row(shape, last, flat)
    rows = [Box((first, *(0 for _ in tail)), (last - first, *tail), first * row)] if first < last else []
    before, after = Range(flat.start, first * row), Range(last * row, flat.stop)
    return [*_in_row(shape, first - 1, before), *rows, *_in_row(shape, last, after)]


def _in_row(shape: tuple[int, ...], index: int, flat: Range) -> list[Box]:
    head = index * math.prod(shape[1:])
    return [
        Box((index, *box.offsets), (1, *box.sizes), head + box.start) for box in boxes(shape[1:], flat.shift(-head))
    ]
