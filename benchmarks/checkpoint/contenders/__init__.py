"""The contenders by name. No torch here: the driver lists them, only a worker imports one.

A contender's module has one function, build(job, **options), which meets the other ranks and returns a Contender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from benchmarks.checkpoint.job import StoreJob


class Contender(Protocol):
    """One rank of a training state and a way to keep it on disk. Every rank is called alike."""

    def state_bytes(self) -> int:
        """Of this rank's part of the state."""

    def fill(self) -> None:
        """Give the state values that `check` knows again."""

    def forget(self) -> None:
        """Overwrite the state."""

    def check(self) -> None:
        """Raise ValueError unless the state is what `fill` made it."""

    def save(self, path: Path) -> None:
        """Begin to save into the new folder `path`; returns when training could go on."""

    def flush(self) -> None:
        """Return when all that was saved is written, and synced if the contender syncs at all."""

    def load(self, path: Path) -> None: ...

    def close(self) -> None: ...


class Adapter(Protocol):
    """What a contender's module offers."""

    def build(self, job: StoreJob, **options: int | bool) -> Contender: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a contender is, how to start it and what it needs.

    Memory is of all ranks together at the worst moment, in sizes of the state: memory + memory_per_rank * ranks.
    """

    module: str
    engine: str  # in ENGINES: whose interpreter and version it needs
    options: Mapping[str, int | bool] = field(default_factory=dict)
    memory: float = 1.0
    memory_per_rank: float = 0.0
    syncs: bool = True  # its files are safe on disk when it says that they are written
    is_floor: bool = False


def _floor(*, buffer_mib: int, direct: bool) -> Entry:
    options = {"buffer_mib": buffer_mib, "direct": direct}
    return Entry(module="benchmarks.checkpoint.contenders.floor", engine="ddp", options=options, is_floor=True)


def _zero(stage: int, *, behind: bool) -> Entry:
    return Entry(
        module="benchmarks.checkpoint.contenders.zero",
        engine=f"zero{stage}",
        options={"stage": stage, "behind": behind},
        memory=(2 / 3 if stage in (1, 2) else 1.0)
        + behind,  # of the whole, weights are a third, Adam's states the rest
        memory_per_rank=1 / 3 if stage in (1, 2) else 0.0,
    )


def _torch(*, synced: bool, mapped: bool) -> Entry:
    return Entry(
        module="benchmarks.checkpoint.contenders.torch_file",
        engine="ddp",
        options={"synced": synced, "mapped": mapped},
        memory=1.0 if mapped else 2.0,
        syncs=synced,
    )


def _dcp(*, behind: bool) -> Entry:
    return Entry(
        module="benchmarks.checkpoint.contenders.dcp",
        engine="fsdp2",
        options={"behind": behind},
        memory=2.2 if behind else 1.2,
    )


def _ds(stage: int) -> Entry:
    return Entry(
        module="benchmarks.checkpoint.contenders.ds",
        engine=f"ds{stage}",
        options={"stage": stage},
        memory=2.0,
        memory_per_rank=1.5,
        syncs=False,
    )


CONTENDERS: dict[str, Entry] = {
    "plain1": _floor(buffer_mib=1, direct=False),
    "plain4": _floor(buffer_mib=4, direct=False),
    "plain16": _floor(buffer_mib=16, direct=False),
    "direct1": _floor(buffer_mib=1, direct=True),
    "direct4": _floor(buffer_mib=4, direct=True),
    "direct16": _floor(buffer_mib=16, direct=True),
    "zero1": _zero(1, behind=False),
    "zero1_async": _zero(1, behind=True),
    "zero3": _zero(3, behind=False),
    "zero3_async": _zero(3, behind=True),
    "torch": _torch(synced=True, mapped=False),
    "torch_mmap": _torch(synced=False, mapped=True),
    "dcp": _dcp(behind=False),
    "dcp_async": _dcp(behind=True),
    "ds1": _ds(1),
    "ds3": _ds(3),
}
DEFAULT = "plain1,plain16,direct4,direct16,zero1,zero1_async,zero3,torch,torch_mmap,dcp,dcp_async"
