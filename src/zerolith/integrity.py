"""Looking for values that have changed by themselves: broken memory, a broken link, a rank that went its own way.

[Note: versions] torch counts the writes to a tensor. A shard whose bits differ though nobody wrote to it has been
damaged; one that was written to (by a user's edit, by loading) is merely new.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from zerolith.checkpoint import Sharded, digest
from zerolith.comm import Comm, agree
from zerolith.errors import IntegrityError
from zerolith.partitioning import REPLICATE

SHOWN = 5  # tensors that a message lists


class Integrity:
    """Compares, every `interval` steps, what should be equal; 0 never does. One per engine."""

    def __init__(self, sharded: Sharded, *, interval: int) -> None:
        self._sharded = sharded
        self._interval = interval
        self._remembered: dict[str, tuple[int, str]] = {}  # at rest: name -> (version, digest)
        self._since = 0  # the step after which they were taken

    @property
    def _comm(self) -> Comm:
        return self._sharded.model.comm

    def before_step(self, step: int, values: Any) -> None:
        """Compare replicas if `step` is a multiple of the interval, and shards with their digests if there are any.

        values: JSON that must be equal on all ranks. Collective then. Raises IntegrityError on every rank, naming
        rank and tensor, before the step has used what is wrong.
        """
        if self._since:
            self._check_at_rest()
        if self._interval and step % self._interval == 0:
            self._compare({"learning rates, loss scale or counters": json.dumps(values), **self._replicas()}, step)

    def after_step(self, step: int) -> None:
        """Take digests of the shards at rest if `step` is a multiple of the interval."""
        if self._interval and step % self._interval == 0:
            self._remembered = {name: (version, digest(tensor)) for name, version, tensor in self._at_rest()}
            self._since = step

    def _check_at_rest(self) -> None:
        error = None
        changed = [
            name
            for name, version, tensor in self._at_rest()
            if self._remembered.get(name, ("",))[0] == version and digest(tensor) != self._remembered[name][1]
        ]
        if changed:
            error = IntegrityError(
                f"rank {self._sharded.rank}: the bits of {_listed(changed)} changed in memory after step {self._since} "
                "though nobody wrote to them; suspect this host's memory, and go on from a checkpoint"
            )
        self._remembered, self._since = {}, 0
        agree(self._comm, error, doing="checking shards at rest", kind=IntegrityError)

    def _compare(self, own: dict[str, str], step: int) -> None:
        rows = self._comm.all_gather_bytes("\n".join(own.values()).encode(), name="digests of replicas")
        if len(set(rows)) == 1:
            return
        table = [row.decode().split("\n") for row in rows]
        odd: dict[int, list[str]] = {}
        for name, column in zip(own, zip(*table, strict=True), strict=True):
            common, count = Counter(column).most_common(1)[0]
            for rank, value in enumerate(column):
                if value != common or 2 * count <= len(column):  # without a majority nobody is known to be right
                    odd.setdefault(rank, []).append(name)
        who = "; ".join(f"rank {rank}: {_listed(names)}" for rank, names in odd.items())
        raise IntegrityError(
            f"ranks hold different values before step {step} of what must be equal: {who}. Suspect those hosts' memory "
            "or links, or code that runs on some ranks only; go on from a checkpoint"
        )

    def _replicas(self) -> dict[str, str]:
        """Digests of what every rank holds whole, sharded parameters gathered for it one unit at a time. Collective."""
        digests: dict[str, str] = {}
        for section, own, index, member in self._sharded.slots():
            if not section.is_sharded:
                digests[f"weights of {member.name}"] = digest(member.param)
            optimizer = self._sharded.optimizer
            if own is None or optimizer is None or section.main is None or section.main.placement is not REPLICATE:
                continue
            with section.resident():
                for param, inside, _ in optimizer.locate(own, index):
                    held = {"master": param, **optimizer.state_of(param)}
                    for key, value in held.items():
                        if isinstance(value, Tensor) and value.shape == param.shape:
                            digests[f"{key} of {member.name}"] = digest(value.view(-1)[inside.start : inside.stop])
        for unit in self._sharded.model.units:
            if unit.is_sharded:
                unit.gather()
                for section in unit.sections:
                    digests |= {f"gathered weights of {each.name}": digest(each.param) for each in section.members}
                unit.release()
        return digests

    def _at_rest(self) -> Iterator[tuple[str, int, Tensor]]:
        """What this rank's host memory keeps from step to step, and how often it was written to."""
        for name, tensor in self._tensors_at_rest():
            yield name, tensor._version, tensor
        optimizer = self._sharded.optimizer
        for section in self._sharded.model.sections if optimizer is not None else ():
            if section.is_split and section.weights.data.device.type == "cpu":
                assert optimizer is not None, "else nothing is split"
                assert optimizer.split_masters is not None, "else nothing is split"
                kept = optimizer.split_masters.of(section)
                for number, tensor in enumerate(kept.tensors()):
                    yield f"remainders of {section.name}, part {number}", kept.version, tensor

    def _tensors_at_rest(self) -> Iterator[tuple[str, Tensor]]:
        optimizer = self._sharded.optimizer
        owns = optimizer.here() if optimizer is not None else []  # the file of the others has checksums of its own
        here = {own.section for own in owns}
        if optimizer is not None and optimizer.split_masters is not None:
            owns = optimizer.gradients  # their states are here, too
        for section in self._sharded.model.sections:
            section.settle()
            if section.weights.data.device.type != "cpu":
                continue
            if section.is_sharded and not section.is_elsewhere:  # else every rank has them, and replicas are compared
                yield f"weights of {section.name}", section.weights.data
            if section not in here:
                continue
            if section.main is not None and section.main.data.data_ptr() != section.weights.data.data_ptr():
                yield f"master of {section.name}", section.main.data
            for index, master in section.masters.items():
                yield f"master of {section.members[index].name}", master
        for own in owns:
            assert optimizer is not None, "else there is nothing to step"
            for number, piece in enumerate(optimizer.pieces[own]):
                for key, value in optimizer.state_of(piece.param).items():
                    if isinstance(value, Tensor) and value.device.type == "cpu":
                        yield f"{key} of {own.section.name}, piece {number}", value


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
