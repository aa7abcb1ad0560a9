"""Moving a buffer's content from one placement to another: the only four moves that ZeRO makes."""

from __future__ import annotations

from collections.abc import Callable

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, Pending, done
from zerolith.partitioning import PARTIAL, REPLICATE, SHARD, Placement


def redistribute(source: FlatBuffer, target: FlatBuffer, *, comm: Comm, name: str, fresh: bool = True) -> Pending:
    """Bring `target` to hold `source`'s content in its own placement and dtype; equal placements cost a copy.

    PARTIAL sources are summed over ranks; with `fresh=False` that sum is added to what `target` holds. Both
    buffers must stay untouched until the result is waited for. Collective over `comm` unless placements agree.
    """
    return TRANSITIONS[source.placement, target.placement](source, target, comm, name, fresh)


def _copy(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, fresh: bool) -> Pending:
    if not source.shares_memory_with(target):
        target.data.copy_(source.data)
    return done()


def _local_slice(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, fresh: bool) -> Pending:
    return _copy(source.own(), target, comm, name, fresh)


def _all_gather(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, fresh: bool) -> Pending:
    if not source.shares_memory_with(target):
        target.own().data.copy_(source.data)
    return comm.all_gather(target.data, name=name)


def _reduce_scatter(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, fresh: bool) -> Pending:
    return comm.reduce_scatter(source.data, target.data, fresh=fresh, name=name)


def _all_reduce(source: FlatBuffer, target: FlatBuffer, comm: Comm, name: str, fresh: bool) -> Pending:
    # Not the backend's all-reduce: its order of additions is its own, and the sum must have the bits that a
    # reduce-scatter gives at the other stages. The bytes are the same.
    reduced = comm.reduce_scatter(source.data, target.own().data, fresh=fresh, name=name)
    return Then(reduced, lambda: comm.all_gather(target.data, name=name).wait())


class Then:
    """A collective, and what follows when it is done."""

    def __init__(self, first: Pending, finish: Callable[[], None]) -> None:
        self._first = first
        self._finish = finish

    def wait(self) -> None:
        self._first.wait()
        self._finish()


_Move = Callable[[FlatBuffer, FlatBuffer, Comm, str, bool], Pending]
TRANSITIONS: dict[tuple[Placement, Placement], _Move] = {
    (SHARD, REPLICATE): _all_gather,
    (PARTIAL, REPLICATE): _all_reduce,
    (PARTIAL, SHARD): _reduce_scatter,
    (REPLICATE, SHARD): _local_slice,
    (REPLICATE, REPLICATE): _copy,
    (SHARD, SHARD): _copy,
}
