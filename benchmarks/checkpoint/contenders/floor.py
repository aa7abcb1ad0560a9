"""Plain sequential writing and reading of as many bytes, one file per rank. Standard library only."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from benchmarks.checkpoint.job import StoreJob

MIB = 2**20
PAGE_BYTES = 4096  # O_DIRECT's unit
HUGE_BYTES = 2 * MIB
BLOCK_BYTES = 64 * MIB  # of random bytes, repeated


def build(job: StoreJob, *, buffer_mib: int, direct: bool) -> Floor:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    size = -(-job.state_bytes // (world * PAGE_BYTES)) * PAGE_BYTES
    return Floor(size, rank, buffer_bytes=buffer_mib * MIB, flags=os.O_DIRECT if direct else 0)


class Floor:
    """`size` bytes in memory, written from there and read back to there in pieces of `buffer_bytes`."""

    def __init__(self, size: int, rank: int, *, buffer_bytes: int, flags: int) -> None:
        self.size = size
        self.name = f"rank{rank}"
        self.buffer_bytes = min(buffer_bytes, size)
        self.flags = flags
        self._state = huge_pages(size)
        self._block = os.urandom(min(BLOCK_BYTES, size))

    def state_bytes(self) -> int:
        return self.size

    def fill(self) -> None:
        for start in range(0, self.size, len(self._block)):
            part = self._state[start : start + len(self._block)]
            part[:] = self._block[: len(part)]

    def forget(self) -> None:
        self._state[:] = bytes(self.size)

    def check(self) -> None:
        """That the state is what `fill` has written."""
        for start in range(0, self.size, len(self._block)):
            part = self._state[start : start + len(self._block)]
            if part != self._block[: len(part)]:
                raise ValueError("what was read is not what was written.")

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        file = os.open(path / self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self.flags, 0o666)
        try:
            for start in range(0, self.size, self.buffer_bytes):
                part = self._state[start : start + self.buffer_bytes]
                while part:
                    part = part[os.write(file, part) :]
            os.fsync(file)
        finally:
            os.close(file)

    def flush(self) -> None:
        """Nothing: `save` has synced."""

    def load(self, path: Path) -> None:
        file = os.open(path / self.name, os.O_RDONLY | self.flags)
        try:
            done = 0
            while done < self.size:
                done += os.preadv(file, [self._state[done : done + self.buffer_bytes]], done)
        finally:
            os.close(file)

    def close(self) -> None:
        """Nothing: the process ends."""


def huge_pages(size: int) -> memoryview:
    """Memory on huge pages where there are any: a transfer with O_DIRECT is cut where physical memory is."""
    pages = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_BYTES
    return memoryview(pages)[start : start + size]
