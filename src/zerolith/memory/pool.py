"""Host buffers that are used again and again: to page-lock memory takes far longer than to fill it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from zerolith.errors import OffloadError
from zerolith.memory.pinned import host_bytes

MOST_TOO_LARGE = 2  # times; sizes of batches differ, and to page-lock memory for each would be slow


class HostPool:
    """Buffers by size. With those in use it keeps `most_kept` times as many bytes as were ever in use at once, at most.

    Of those that are large enough, and not too large, the smallest is lent. Those of the size that was not lent for
    longest go first.
    """

    def __init__(self, *, pinned: bool, most_kept: float = 1.0) -> None:
        self.pinned = pinned
        self.most_kept = most_kept
        self.num_allocated = 0
        self._used_bytes = self._idle_bytes = self._most_bytes = 0
        self._idle: dict[int, list[Tensor]] = {}  # by size in bytes; the one lent last is last
        self._returned: deque[Tensor] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes of the buffers that are lent."""
        self._collect()
        return self._used_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait to be lent again."""
        self._collect()
        return self._idle_bytes

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8, with undefined content, of a storage that may be larger.

        Raises OffloadError if there is no memory.
        """
        self._collect()
        fitting = [size for size, same in self._idle.items() if same and nbytes <= size <= MOST_TOO_LARGE * nbytes]
        size = min(fitting, default=nbytes)
        self._used_bytes += size
        self._most_bytes = max(self._most_bytes, self._used_bytes)
        same = self._idle.pop(size, [])
        self._idle[size] = same
        if same:
            self._idle_bytes -= size
            return same.pop()[:nbytes]
        self._shrink()
        try:
            buffer = host_bytes(nbytes, pinned=self.pinned)
        except OffloadError:
            self._used_bytes -= nbytes
            raise
        self.num_allocated += 1
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Take a buffer back. Garbage collection calls it, at any moment and on any thread: it only notes it."""
        self._returned.append(buffer)

    def clear(self) -> None:
        """Let the buffers go that wait to be lent, and forget how many bytes were in use at once."""
        self._collect()
        self._idle.clear()
        self._idle_bytes, self._most_bytes = 0, self._used_bytes

    def _collect(self) -> None:
        while self._returned:
            buffer = _whole(self._returned.popleft())
            self._idle.setdefault(buffer.nbytes, []).append(buffer)
            self._used_bytes -= buffer.nbytes
            self._idle_bytes += buffer.nbytes

    def _shrink(self) -> None:
        while self._idle_bytes and self._used_bytes + self._idle_bytes > self.most_kept * self._most_bytes:
            size = next(iter(self._idle))
            if not self._idle[size]:
                del self._idle[size]
                continue
            self._idle[size].pop()
            self._idle_bytes -= size


def _whole(buffer: Tensor) -> Tensor:
    """All of a buffer of which a part was lent."""
    return torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
