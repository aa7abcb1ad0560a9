"""One rank's file on a fast disk, to which tensors go while nobody needs them. Knows memory and bytes only.

Blocks are moved by a few threads, so that many requests are in flight, with O_DIRECT where the file system has it: what
is swapped must not fill the page cache. What is read back must have the checksum that it had when it was written.

[Note: edges] O_DIRECT asks for addresses, lengths and offsets that are multiples of the device's grain, and tensors
begin where they like. So what is written is the tensor's body, from its first such address to its last, straight from
its memory; the few bytes before and after it are kept in memory. It is read straight into place, too, unless the tensor
has come to lie otherwise since: then it passes through an aligned block.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import xxhash

from zerolith.errors import OffloadError
from zerolith.memory.pages import ALIGNMENT, address_of, page_buffer
from zerolith.memory.threads import helpers, start_task

BLOCK_BYTES = 4 * 2**20  # of one request
GRAIN = 512  # bytes, of most devices
MAX_THREADS = 8


@dataclass(eq=False)
class Region:
    """A tensor's place in the file, and what was last written: a checksum of each block, and the edges."""

    offset: int
    nbytes: int
    digests: list[int] = field(default_factory=list)
    head: bytes = b""
    tail: bytes = b""

    @property
    def body(self) -> int:
        """Bytes that are in the file."""
        return self.nbytes - len(self.head) - len(self.tail)


class Transfer:
    """Reads or writes under way, each of which tells when it ended.

    `wait()` ends them and raises OffloadError if one has failed.
    """

    def __init__(self, futures: Sequence[Future[float]], storage: torch.UntypedStorage, *, began: float) -> None:
        self.seconds: float | None = None  # from the beginning to the end of the last, once they were waited for
        self._futures = futures
        self._storage: torch.UntypedStorage | None = storage  # whose memory they use, kept until they have ended
        self._began = began

    def wait(self) -> None:
        wait(self._futures)
        self._storage = None
        ended = [future.result() for future in self._futures]
        self.seconds = max(ended, default=self._began) - self._began


class SwapFile:
    """Owner of a nameless file in `folder`: when the process ends, however it does, the file is gone.

    Raises OffloadError if it cannot be made. Methods may be called by one thread at a time.
    """

    place = "on disk"

    def __init__(self, folder: Path, *, threads: int = 8, direct: bool = True) -> None:
        self.folder = folder
        self.is_direct = direct and hasattr(os, "O_DIRECT")
        self.nbytes = 0
        self._file = self._open()
        self._grain = self._smallest_grain() if self.is_direct else 1
        self._threads = helpers(min(threads, MAX_THREADS), "zerolith swap")
        self._local = threading.local()

    def add(self, nbytes: int) -> Region:
        """A new region, with room reserved on the disk. Raises OffloadError if there is none."""
        region = Region(self.nbytes, nbytes)
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT
        try:
            if room:
                os.posix_fallocate(self._file, self.nbytes, room)
        except OSError as error:
            raise self._failure(error, f"making room for {nbytes} more bytes beside {self.nbytes}") from error
        self.nbytes += room
        return region

    def write(self, region: Region, storage: torch.UntypedStorage) -> Transfer:
        """Begin to write the storage, which must be left alone until the transfer is waited for."""
        address = storage.data_ptr()
        head = min(-address % self._grain, region.nbytes)
        tail = (region.nbytes - head) % self._grain
        region.head = ctypes.string_at(address, head)
        region.tail = ctypes.string_at(address + region.nbytes - tail, tail)
        region.digests = [0] * -(-region.body // BLOCK_BYTES)
        return self._start(self._write_block, region, storage)

    def read(self, region: Region, storage: torch.UntypedStorage) -> Transfer:
        """Begin to fill the storage with what was written last."""
        address = storage.data_ptr()
        ctypes.memmove(address, region.head, len(region.head))
        ctypes.memmove(address + region.nbytes - len(region.tail), region.tail, len(region.tail))
        return self._start(self._read_block, region, storage)

    def close(self) -> None:
        """Give the disk's room back. What is under way is ended first."""
        if self._threads is not None:
            self._threads.shutdown()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _start(
        self, move: Callable[[Region, int, int, int], None], region: Region, storage: torch.UntypedStorage
    ) -> Transfer:
        body, began = storage.data_ptr() + len(region.head), perf_counter()
        starts = range(0, region.body, BLOCK_BYTES)
        moves = [partial(_timed, partial(move, region, number, body, start)) for number, start in enumerate(starts)]
        return Transfer([start_task(self._threads, each) for each in moves], storage, began=began)

    def _write_block(self, region: Region, number: int, body: int, start: int) -> None:
        block = _memory(body + start, min(BLOCK_BYTES, region.body - start))
        region.digests[number] = xxhash.xxh3_64_intdigest(block)
        try:
            done = os.pwrite(self._file, block, region.offset + start)
        except OSError as error:
            raise self._failure(error, f"writing {len(block)} bytes at {region.offset + start}") from error
        if done != len(block):
            raise OffloadError(f"{self.folder}: only {done} of {len(block)} bytes could be written to the swap file")

    def _read_block(self, region: Region, number: int, body: int, start: int) -> None:
        length, target = min(BLOCK_BYTES, region.body - start), body + start
        is_straight = target % self._grain == 0
        block = _memory(target, length) if is_straight else self._bounce()[:length]
        try:
            done = os.preadv(self._file, [block], region.offset + start)
        except OSError as error:
            raise self._failure(error, f"reading {length} bytes at {region.offset + start}") from error
        if done != length or xxhash.xxh3_64_intdigest(block) != region.digests[number]:
            raise OffloadError(
                f"{self.folder}: bytes {region.offset + start} to {region.offset + start + length} of the swap file "
                "are not what was written there; the disk is broken: go on from a checkpoint"
            )
        if not is_straight:
            ctypes.memmove(target, address_of(block), length)

    def _bounce(self) -> memoryview:
        """This thread's aligned block."""
        if not hasattr(self._local, "block"):
            try:
                self._local.block = page_buffer(BLOCK_BYTES)
            except (MemoryError, OSError) as error:
                raise OffloadError(f"{self.folder}: there is no memory for a transfer: {error}") from error
        found: memoryview = self._local.block
        return found

    def _smallest_grain(self) -> int:
        """Of addresses, lengths and offsets, by trying. Raises OffloadError."""
        block = page_buffer(2 * ALIGNMENT)
        for grain in (GRAIN, ALIGNMENT):
            try:
                os.pwrite(self._file, block[grain : 2 * grain], 0)
                return grain
            except OSError as error:
                if error.errno != errno.EINVAL or grain == ALIGNMENT:
                    raise self._failure(error, "writing for the first time") from error
        return ALIGNMENT

    def _open(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._nameless(os.O_DIRECT if self.is_direct else 0)
        except OSError as error:
            if not self.is_direct:
                raise self._failure(error, "making the swap file") from error
            self.is_direct = False  # tmpfs and some network file systems do not have it
            return self._open()

    def _nameless(self, flags: int) -> int:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(self.folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # a file system, or a kernel, without it
                    raise
        path = self.folder / f".zerolith-swap-{os.getpid()}-{id(self):x}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
        os.unlink(path)
        return file

    def _failure(self, error: OSError, doing: str) -> OffloadError:
        return OffloadError(f"{self.folder}: {error.strerror or error} while {doing} in the swap file")


def _memory(address: int, nbytes: int) -> memoryview:
    """The process's own memory there; it is the caller's to keep it."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _timed(move: Callable[[], None]) -> float:
    """Make the call; returns when it ended."""
    move()
    return perf_counter()
