"""Disks that fail, die or remember: what a save does to files, one numbered operation at a time."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from zerolith.checkpoint import Disk


class Op(NamedTuple):
    """One operation: create, write, sync, sync_dir, rename, make_dir, unlink or remove_dir."""

    kind: str
    path: Path
    target: Path | None = None  # of a rename
    data: bytes = b""  # of a write


class FaultyDisk(Disk):
    """The real file system under a subclass's `before`; several threads may use it.

    is_volatile: leave out what only a power cut could tell, for speed.
    """

    def __init__(self, *, is_volatile: bool = False) -> None:
        self.begun: list[Op] = []
        self.trace: list[Op] = []  # of them, those that worked
        self.is_volatile = is_volatile
        self._paths: dict[int, Path] = {}  # by descriptor
        self._turn = threading.RLock()

    def before(self, number: int, op: Op) -> None:
        """Operation `number`, counted from 0, is about to be done; what this raises fails it."""

    def create(self, path: Path) -> int:
        file: int = self._do(Op("create", path), super().create, path)
        self._paths[file] = path
        return file

    def write(self, file: int, data: memoryview) -> None:
        self._do(Op("write", self._paths[file], data=bytes(data)), super().write, file, data)

    def sync(self, file: int) -> None:
        self._do(Op("sync", self._paths[file]), _nothing if self.is_volatile else super().sync, file)

    def sync_dir(self, path: Path) -> None:
        self._do(Op("sync_dir", path), _nothing if self.is_volatile else super().sync_dir, path)

    def rename(self, source: Path, target: Path) -> None:
        self._do(Op("rename", source, target), super().rename, source, target)

    def make_dir(self, path: Path) -> None:
        self._do(Op("make_dir", path), super().make_dir, path)

    def unlink(self, path: Path) -> None:
        self._do(Op("unlink", path), super().unlink, path)

    def remove_dir(self, path: Path) -> None:
        self._do(Op("remove_dir", path), super().remove_dir, path)

    def _do(self, op: Op, call: Callable[..., object], *args: object) -> object:
        with self._turn:
            self.begun.append(op)
            self.before(len(self.begun) - 1, op)
            result = call(*args)
            self.trace.append(op)
        return result


def _nothing(*_: object) -> None:
    pass


class Moment(NamedTuple):
    """A point in a series of operations: before operation `number`, or when a half of what it writes is there."""

    number: int
    is_halfway: bool = False


def moments(ops: list[Op]) -> list[Moment]:
    """Every point at which a process may die: before each operation, in the midst of each write, after the last."""
    found = []
    for number, op in enumerate(ops):
        found.append(Moment(number))
        if op.kind == "write" and len(op.data) > 1:
            found.append(Moment(number, is_halfway=True))
    return [*found, Moment(len(ops))]


class DeadlyDisk(FaultyDisk):
    """Ends its process, or all ranks, at a moment."""

    def __init__(self, moment: Moment, *, takes_all: bool = False) -> None:
        super().__init__(is_volatile=True)
        self.moment = moment
        self.takes_all = takes_all

    def before(self, number: int, op: Op) -> None:
        if Moment(number) == self.moment:
            die(takes_all=self.takes_all)

    def write(self, file: int, data: memoryview) -> None:
        if Moment(len(self.begun), is_halfway=True) == self.moment:
            Disk.write(self, file, data[: len(data) // 2])
            die(takes_all=self.takes_all)
        super().write(file, data)

    def at_end(self) -> None:
        """The save is over."""
        if Moment(len(self.begun)) == self.moment:
            die(takes_all=self.takes_all)


def die(*, takes_all: bool = False) -> None:
    """SIGKILL for this process, or for every rank of the job (see jobs.py)."""
    if takes_all:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes at once


class FailingDisk(FaultyDisk):
    """Fails operation `number`, counted from 0, as the system would."""

    def __init__(self, number: int, code: int = errno.EIO) -> None:
        super().__init__()
        self.number = number
        self.code = code

    def before(self, number: int, op: Op) -> None:
        if number == self.number:
            names = (str(op.path),) if op.kind not in ("write", "sync") else ()  # as for calls that take a descriptor
            raise OSError(self.code, os.strerror(self.code), *names)


class FullDisk(FaultyDisk):
    """Has room for `room` bytes in files whose name `matches`, and then is full, in the midst of a write."""

    def __init__(self, matches: Callable[[Path], bool], room: int) -> None:
        super().__init__()
        self.matches = matches
        self.room = room

    def write(self, file: int, data: memoryview) -> None:
        if self.matches(self._paths[file]):
            fits, self.room = data[: self.room], self.room - len(data)
            if self.room < 0:
                self.room = 0
                super().write(file, fits)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data)


class SlowDisk(FaultyDisk):
    """Waits before each operation until `go` is set, at most for `limit_s`."""

    def __init__(self, *, limit_s: float = 10.0) -> None:
        super().__init__()
        self.go = threading.Event()
        self.limit_s = limit_s

    def before(self, number: int, op: Op) -> None:
        self.go.wait(self.limit_s)


class ForgetfulDisk(FaultyDisk):
    """Flips one bit of what it writes to files whose name `matches`, and says nothing."""

    def __init__(self, matches: Callable[[Path], bool], *, at: int = 0) -> None:
        super().__init__()
        self.matches = matches
        self.at = at  # byte of the file
        self._reached = 0

    def write(self, file: int, data: memoryview) -> None:
        if self.matches(self._paths[file]):
            start, self._reached = self._reached, self._reached + len(data)
            if start <= self.at < self._reached:
                changed = bytearray(data)
                changed[self.at - start] ^= 1
                data = memoryview(changed)
        super().write(file, data)
