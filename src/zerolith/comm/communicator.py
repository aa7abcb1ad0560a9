"""One axis of ranks and its collectives.

Backends differ: gloo's own reduce-scatter sends twice the bytes and its all-gather is ten times slower than a
broadcast per owner, while NCCL's rings are best. The tables GATHER and REDUCE below hold that choice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zerolith.comm.clock import CommsLog
from zerolith.comm.journal import Journal, Traffic
from zerolith.comm.ordered import add_into
from zerolith.comm.pool import KEPT_BYTES, Pool
from zerolith.errors import CollectiveMismatchError, PeerLostError
from zerolith.layout import BLOCK


class Pending(Protocol):
    """A collective under way. `wait()` makes its result usable and may be called once."""

    def wait(self) -> None: ...


class _Pending:
    def __init__(self, works: Sequence[Any], name: str, finish: Callable[[], None] | None = None) -> None:
        # dist.Work objects; torch gives None for a collective that is done at once.
        self.works = [work for work in works if work is not None]
        self._name = name
        self._finish = finish

    def wait(self) -> None:
        for work in self.works:
            _guard(self._name, work.wait)
        if self._finish is not None:
            self._finish()


def done() -> Pending:
    """A collective that needs no waiting."""
    return _Pending((), "")


class Comm:
    """A process group with a name for each of its uses; a group of one rank communicates nothing.

    Every method that moves data is collective: all ranks call it, in the same order, with the same sizes.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, *, reproducible: bool = False) -> None:
        self.group = group
        self.device = device
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.backend = backend_on(device.type, dist.get_backend_config(group)) if group is not None else "none"
        self.traffic = Traffic()
        self.journal = Journal()
        self.pool = Pool()
        self.log: CommsLog | None = None  # set by whoever wants to know how long collectives take
        self._gather = GATHER.get(self.backend, _gather_by_broadcast)
        self._reduce = _reduce_ordered if reproducible else REDUCE.get(self.backend, _reduce_ordered)

    def all_gather(self, whole: Tensor, *, name: str) -> Pending:
        """Fill `whole`, (size * n,), of which rank r has written elements [r*n, (r+1)*n)."""
        if self.size == 1:
            return done()
        sent = self._note(name, "all_gather", whole)
        return self._timed(self._gather(self, whole, name), "all_gather", name, sent)

    def reduce_scatter(
        self, whole: Tensor, into: Tensor, *, fresh: bool, name: str, squares: Tensor | None = None
    ) -> Pending:
        """into (+)= the sum over ranks of their `whole`'s piece for this rank.

        whole: (size * n,) in the wire dtype, untouched until waited for. into: (n,) in the accumulation dtype;
        overwritten if `fresh`, else added to. squares: (blocks,) fp64 gets the square sums of `into`'s blocks.
        """
        total = _Total(into, fresh, squares)
        if self.size == 1:
            total.add([whole])
            return done()
        sent = self._note(name, "reduce_scatter", whole)
        return self._timed(self._reduce(self, whole, total, name), "reduce_scatter", name, sent)

    def all_to_all(self, out: Tensor, inp: Tensor, out_splits: list[int], in_splits: list[int], *, name: str) -> None:
        """Exchange ragged flat pieces: in_splits[r] elements go to rank r, out_splits[r] come from it."""
        if self.size == 1:
            out.copy_(inp)
            return
        # Splits differ by rank, so the journal notes the operation without its size.
        self.journal.note(name, "all_to_all", 0, inp.dtype)
        self.traffic.add("all_to_all", (inp.numel() - in_splits[self.rank]) * inp.element_size())
        _guard(name, dist.all_to_all_single, out, inp, out_splits, in_splits, group=self.group)

    def broadcast(self, tensor: Tensor, *, source: int = 0, name: str) -> None:
        """Overwrite `tensor` on every rank with that of rank `source` of this group."""
        if self.size == 1 or not tensor.numel():
            return
        self.journal.note(name, f"broadcast from {source}", tensor.numel(), tensor.dtype)
        self.traffic.add("broadcast", tensor.nbytes * (self.size - 1) // self.size)
        _guard(name, dist.broadcast, tensor, group_src=source, group=self.group)

    def sum(self, values: Sequence[float], *, name: str) -> list[float]:
        """Element-wise sum over ranks of a few fp64 numbers."""
        return self._all_reduce(values, dist.ReduceOp.SUM, name)

    def max(self, values: Sequence[float], *, name: str) -> list[float]:
        """Element-wise maximum over ranks of a few fp64 numbers; they must not be NaN."""
        return self._all_reduce(values, dist.ReduceOp.MAX, name)

    def all_gather_bytes(self, payload: bytes, *, name: str) -> list[bytes]:
        """Every rank's payload, by rank."""
        sizes = self.max([float(len(payload)) if rank == self.rank else 0.0 for rank in range(self.size)], name=name)
        whole = torch.zeros(self.size, int(max(1.0, *sizes)), dtype=torch.uint8, device=self.device)
        if payload:
            whole[self.rank, : len(payload)].copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        self.all_gather(whole.view(-1), name=name).wait()
        rows = whole.cpu()
        return [ctypes.string_at(row.data_ptr(), int(size)) for row, size in zip(rows, sizes, strict=True)]

    def check_journals(self, highest: float, negated_lowest: float, *, name: str) -> None:
        """Raise CollectiveMismatchError on every rank if the ranks' fingerprints differ.

        The two arguments are the maximum over ranks of each rank's fingerprint and of its negative.
        """
        if highest == -negated_lowest:
            return
        rows = self.all_gather_bytes("\n".join(self.journal.latest()).encode(), name=name)
        entries = {rank: row.decode().splitlines() for rank, row in enumerate(rows)}
        raise CollectiveMismatchError(
            "ranks issued different collectives, so this step's result is wrong on all of them: "
            f"{self.journal.diff(entries)}. Every rank must run the same modules in the same order."
        )

    def _all_reduce(self, values: Sequence[float], op: Any, name: str) -> list[float]:  # op: ReduceOp is untyped
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        _guard(name, dist.all_reduce, tensor, op=op, group=self.group)
        return tensor.tolist()

    def _note(self, name: str, op: str, whole: Tensor) -> int:
        self.journal.note(name, op, whole.numel(), whole.dtype)
        sent = whole.nbytes * (self.size - 1) // self.size
        self.traffic.add(op, sent)
        return sent

    def _timed(self, pending: _Pending, op: str, name: str, sent: int) -> Pending:
        return pending if self.log is None else self.log.watch(pending, pending.works, op=op, name=name, sent=sent)


def backend_on(device_type: str, config: str) -> str:
    """The backend that moves tensors of a kind of device; config: as torch writes a group's, "cpu:gloo,cuda:nccl"."""
    backends = dict(entry.split(":", 1) for entry in config.split(",") if ":" in entry)
    return backends.get(device_type, config)


def _guard(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except RuntimeError as error:  # torch raises plain RuntimeError or DistBackendError, a subclass
        raise PeerLostError(
            f"the collective {name!r} failed: another rank died, raised an error or did not answer in time; "
            f"look for the first error in the other ranks' logs. The backend says: {error}"
        ) from error


def _piece(whole: Tensor, rank: int, size: int) -> Tensor:
    numel = whole.numel() // size
    return whole[rank * numel : (rank + 1) * numel]


def _gather_by_broadcast(comm: Comm, whole: Tensor, name: str) -> _Pending:
    works = []
    for rank in range(comm.size):
        piece = _piece(whole, rank, comm.size)
        works.append(_guard(name, dist.broadcast, piece, group_src=rank, group=comm.group, async_op=True))
    return _Pending(works, name)


def _gather_by_ring(comm: Comm, whole: Tensor, name: str) -> _Pending:
    own = _piece(whole, comm.rank, comm.size)
    return _Pending([_guard(name, _ALL_GATHER, whole, own, group=comm.group, async_op=True)], name)


class _Total(NamedTuple):
    """What a reduction adds to."""

    into: Tensor
    fresh: bool
    squares: Tensor | None

    def add(self, terms: Sequence[Tensor]) -> None:
        add_into(self.into, terms, fresh=self.fresh, squares=self.squares)

    def part(self, start: int, stop: int) -> _Total:
        """Whole blocks of it, from `start` on; the last one may end before."""
        squares = None if self.squares is None else self.squares[start // BLOCK : -(-stop // BLOCK)]
        return _Total(self.into[start:stop], self.fresh, squares)


def _reduce_ordered(comm: Comm, whole: Tensor, total: _Total, name: str) -> _Pending:
    """Exchange the pieces and add them in rank order: the same bits whatever the placement, and 1x the bytes."""
    reduce = _reduce_in_turns if whole.nbytes > KEPT_BYTES else _reduce_at_once
    return reduce(comm, whole, total, name)


def _reduce_at_once(comm: Comm, whole: Tensor, total: _Total, name: str) -> _Pending:
    received = comm.pool.take(whole.numel(), dtype=whole.dtype, device=whole.device)
    work = _guard(name, dist.all_to_all_single, received, whole, group=comm.group, async_op=True)

    def finish() -> None:
        total.add([_piece(received, rank, comm.size) for rank in range(comm.size)])
        comm.pool.give(received)

    return _Pending([work], name, finish)


def _reduce_in_turns(comm: Comm, whole: Tensor, total: _Total, name: str) -> _Pending:
    """Reduce a bounded part of every piece at a time: scratch as large as `whole` would stand at a step's peak."""
    pieces = whole.view(comm.size, -1)
    width = max(KEPT_BYTES // (4 * comm.size * whole.element_size()) // BLOCK, 1) * BLOCK

    def turn(start: int) -> _Pending:
        part = pieces[:, start : start + width].contiguous().view(-1)
        return _reduce_at_once(comm, part, total.part(start, min(start + width, total.into.numel())), name)

    first = turn(0)

    def finish() -> None:
        first.wait()
        for start in range(width, total.into.numel(), width):
            turn(start).wait()

    return _Pending((), name, finish)


def _reduce_by_ring(comm: Comm, whole: Tensor, total: _Total, name: str) -> _Pending:
    own = comm.pool.take(total.into.numel(), dtype=whole.dtype, device=whole.device)
    work = _guard(name, _REDUCE_SCATTER, own, whole, group=comm.group, async_op=True)

    def finish() -> None:
        total.add([own])
        comm.pool.give(own)

    return _Pending([work], name, finish)


# torch 2.13 deprecates the *_tensor names in favour of *_single, which torch 2.11 does not have.
_ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Gather = Callable[[Comm, Tensor, str], _Pending]
_Reduce = Callable[[Comm, Tensor, _Total, str], _Pending]
GATHER: dict[str, _Gather] = {"nccl": _gather_by_ring, "gloo": _gather_by_broadcast}
REDUCE: dict[str, _Reduce] = {"nccl": _reduce_by_ring, "gloo": _reduce_ordered}
