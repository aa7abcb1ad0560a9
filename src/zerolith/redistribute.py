"""Moving a buffer's content from one placement to another: the only four moves that ZeRO makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, Pending, done
from zerolith.partitioning import PARTIAL, REPLICATE, SHARD, Placement


def redistribute(
    source: FlatBuffer,
    target: FlatBuffer,
    *,
    comm: Comm,
    name: str,
    fresh: bool = True,
    squares: Tensor | None = None,
) -> Pending:
    """Bring `target` to hold `source`'s content in its own placement and dtype; equal placements cost a copy.

    PARTIAL sources are summed over ranks; with `fresh=False` that sum is added to what `target` holds, and `squares`,
    if given, gets the square sums of the blocks of this rank's shard of it. Both buffers must stay untouched until the
    result is waited for. Collective over `comm` unless placements agree.
    """
    return TRANSITIONS[source.placement, target.placement](source, target, comm, name, _Sum(fresh, squares))


class _Sum(NamedTuple):
    """How terms are added; without meaning where nothing is."""

    fresh: bool
    squares: Tensor | None


def _copy(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, sum_: _Sum) -> Pending:
    if not source.shares_memory_with(target):
        target.data.copy_(source.data)
    return done()


def _local_slice(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, sum_: _Sum) -> Pending:
    return _copy(source.own(), target, comm, name, sum_)


def _all_gather(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, sum_: _Sum) -> Pending:
    if not source.shares_memory_with(target):
        target.own().data.copy_(source.data)
    return comm.all_gather(target.data, name=name)


def _reduce_scatter(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, sum_: _Sum) -> Pending:
    return comm.reduce_scatter(source.data, target.data, fresh=sum_.fresh, squares=sum_.squares, name=name)


def _all_reduce(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, sum_: _Sum) -> Pending:
    # Not the backend's all-reduce: its order of additions is its own, and the sum must have the bits that a
    # reduce-scatter gives at the other stages. The bytes are the same.
    reduced = _reduce_scatter(source, target.own(), comm, name, sum_)
    return Then(reduced, lambda: comm.all_gather(target.data, name=name).wait())


class Then:
    """A collective, and what follows when it is done."""

    def __init__(self, first: Pending, finish: Callable[[], None]) -> None:
        self._first = first
        self._finish = finish

    def wait(self) -> None:
        self._first.wait()
        self._finish()


_Move = Callable[[FlatBuffer, FlatBuffer, Comm, str, _Sum], Pending]
TRANSITIONS: dict[tuple[Placement, Placement], _Move] = {
    (SHARD, REPLICATE): _all_gather,
    (PARTIAL, REPLICATE): _all_reduce,
    (PARTIAL, SHARD): _reduce_scatter,
    (REPLICATE, SHARD): _local_slice,
    (REPLICATE, REPLICATE): _copy,
    (SHARD, SHARD): _copy,
}
