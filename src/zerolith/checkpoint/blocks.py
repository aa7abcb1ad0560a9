"""Files in blocks through a few aligned buffers: while the disk has one, another is being filled or used.

Transfers go past the page cache where the file system allows it: they are faster by the copy that they save, and what
a checkpoint holds does not push out of memory what others need there.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

from zerolith.checkpoint.disk import Disk
from zerolith.checkpoint.manifest import CHUNK_BYTES, checksum
from zerolith.memory.pages import ALIGNMENT, address_of, page_buffer, set_direct
from zerolith.memory.threads import start_task

WRITE_BYTES = 8 * 2**20  # of a write; larger ones gained nothing
READ_BYTES = 6 * CHUNK_BYTES  # with unaligned ends still a request of less than a block
READS_AHEAD = 3  # at once, so that the disk always has the next request; two larger ones were no faster
TASK_BYTES = 4 * CHUNK_BYTES  # hashed and copied by one task
ALONE_BYTES = 64 * 2**10  # less than this is not worth a task


@dataclass(eq=False)
class _Block:
    memory: memoryview
    filled: int = 0
    copies: list[Future[None]] = field(default_factory=list)  # into it, that may be under way


class BlockWriter:
    """Appends to a new file, and hashes what it is given before it goes anywhere.

    `helpers` hash and copy while the calling thread writes; without any it does both by turns.
    """

    def __init__(self, disk: Disk, file: int, helpers: Executor | None) -> None:
        self._disk = disk
        self._file = file
        self._helpers = helpers
        self._current, self._before = _Block(page_buffer(WRITE_BYTES)), _Block(page_buffer(WRITE_BYTES))
        self._hashed: list[Future[list[str]]] = []  # that may be under way
        set_direct(file, True)

    def put(self, data: memoryview) -> list[Future[list[str]]]:
        """Append `data`, which must stay as it is until `settle`; the futures are of its chunks' checksums in order."""
        hashed = []
        for start in range(0, len(data), TASK_BYTES):
            some = data[start : start + TASK_BYTES]
            helpers = self._helpers if len(some) >= ALONE_BYTES else None
            hashed.append(start_task(helpers, partial(_digests, some)))
            self._hashed = [task for task in (*self._hashed, hashed[-1]) if not task.done()]
            self._append(some, helpers)
        return hashed

    def finish(self) -> None:
        """Write what is left. Raises OSError, as `put` does."""
        self._write(self._before)
        self._write(self._current)

    def settle(self) -> None:
        """Return when no helper uses anybody's memory any more."""
        wait(self._hashed)
        wait([*self._before.copies, *self._current.copies])

    def _append(self, data: memoryview, helpers: Executor | None) -> None:
        while data:
            block = self._current
            part = data[: WRITE_BYTES - block.filled]
            place = block.memory[block.filled : block.filled + len(part)]
            block.copies.append(start_task(helpers, partial(_copy, part, place)))
            block.filled += len(part)
            data = data[len(part) :]
            if block.filled == WRITE_BYTES:
                self._write(self._before)
                self._before, self._current = block, self._before

    def _write(self, block: _Block) -> None:
        wait(block.copies)
        for copy in block.copies:
            copy.result()
        if block.filled:
            self._disk.write(self._file, block.memory[: block.filled])
        block.filled = 0
        block.copies.clear()


def _digests(data: memoryview) -> list[str]:
    return [checksum(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]


def _copy(data: memoryview, place: memoryview) -> None:
    ctypes.memmove(address_of(place), address_of(data), len(data))  # unlike a slice's, it lets other threads run


class Span(NamedTuple):
    """Bytes of an open file."""

    file: int
    offset: int
    nbytes: int


class BlockReader:
    """Reads spans of at most `longest` bytes ahead of their use, in threads of `helpers` if there are any."""

    def __init__(self, longest: int, helpers: Executor | None) -> None:
        self._nbytes = max(READ_BYTES, longest) + 2 * ALIGNMENT
        self._helpers = helpers
        self._buffers = [page_buffer(self._nbytes) for _ in range(READS_AHEAD + 1)]

    def read(self, spans: Iterable[Span]) -> Generator[memoryview, None, None]:
        """What each span holds, in order; shorter where the file ends. The memory is used again for later spans.

        Raises OSError when it comes to the first span of a block that cannot be read.
        """
        blocks, buffers = _grouped(spans, self._nbytes), cycle(self._buffers)
        ahead: deque[tuple[list[Span], Future[memoryview]]] = deque()

        def read_ahead() -> None:
            for block in islice(blocks, READS_AHEAD - len(ahead)):
                is_small = sum(span.nbytes for span in block) < ALONE_BYTES
                helpers = None if is_small else self._helpers
                ahead.append((block, start_task(helpers, partial(_read_block, block, next(buffers)))))

        try:
            read_ahead()
            while ahead:
                block, task = ahead.popleft()
                data = task.result()
                read_ahead()
                for span in block:
                    first = span.offset - _start_of(block)
                    yield data[first : first + span.nbytes]
        finally:
            wait([task for _, task in ahead])  # nobody may write to the buffers any more


def _grouped(spans: Iterable[Span], nbytes: int) -> Iterator[list[Span]]:
    """Spans whose offsets rise in one file, as many as fit in whole pages of `nbytes`."""
    block: list[Span] = []
    for span in spans:
        if block:
            follows = span.file == block[-1].file and span.offset >= block[-1].offset
            if not follows or span.offset + span.nbytes + ALIGNMENT - _start_of(block) > nbytes:
                yield block
                block = []
        block.append(span)
    if block:
        yield block


def _start_of(block: Sequence[Span]) -> int:
    return block[0].offset - block[0].offset % ALIGNMENT


def _read_block(block: Sequence[Span], buffer: memoryview) -> memoryview:
    file, start = block[0].file, _start_of(block)
    needed = max(span.offset + span.nbytes for span in block) - start
    target, done, is_plain = buffer[: -(-needed // ALIGNMENT) * ALIGNMENT], 0, False
    while done < needed:
        try:
            count = os.preadv(file, [target[done:]], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or is_plain:
                raise
            set_direct(file, False)  # another thread may have done so
            is_plain = True
            continue
        if not count:
            break
        done += count
    return target[:done]
