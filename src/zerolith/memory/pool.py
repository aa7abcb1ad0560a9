"""Host buffers that are used again and again: to page-lock memory takes far longer than to fill it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class HostPool:
    """Buffers by size. With those in use it keeps as many bytes as were ever in use at once, and no more than `keeps`.

    Those of the size that was not asked for longest go first.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.keeps = 0.0  # bytes, however few were in use
        self.num_allocated = 0
        self._used_bytes = self._idle_bytes = self._most_bytes = 0
        self._idle: dict[int, list[Tensor]] = {}  # by size in bytes; the one asked for last is last
        self._returned: deque[Tensor] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes that are lent."""
        self._collect()
        return self._used_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait to be lent again."""
        self._collect()
        return self._idle_bytes

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8, with undefined content."""
        self._collect()
        self._used_bytes += nbytes
        self._most_bytes = max(self._most_bytes, self._used_bytes)
        same = self._idle.pop(nbytes, [])
        self._idle[nbytes] = same
        if same:
            self._idle_bytes -= nbytes
            return same.pop()
        self._shrink()
        self.num_allocated += 1
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Take a buffer back. Garbage collection calls it, at any moment and on any thread: it only notes it."""
        self._returned.append(buffer)

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._idle.setdefault(buffer.nbytes, []).append(buffer)
            self._used_bytes -= buffer.nbytes
            self._idle_bytes += buffer.nbytes

    def _shrink(self) -> None:
        while self._used_bytes + self._idle_bytes > max(self._most_bytes, self.keeps):
            size = next(iter(self._idle))
            if not self._idle[size]:
                del self._idle[size]
                continue
            self._idle[size].pop()
            self._idle_bytes -= size
