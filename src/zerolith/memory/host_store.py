"""Where tensors of a device go while nobody needs them: host memory, or through it a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerolith.memory.lane import AtOnce, Beside, Copier, Copy
from zerolith.memory.pinned import host_bytes
from zerolith.memory.pool import HostPool
from zerolith.memory.swap import Region, SwapFile, Transfer


@dataclass(eq=False)
class HostRegion:
    """A tensor's place in host memory."""

    nbytes: int
    data: Tensor = field(repr=False)  # uint8


class Copied:
    """A copy under way. `wait()` lets what the device is given from then on run after it."""

    seconds: float | None = None  # the device copies by itself, and this process does not see the end

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        self._wait()


class Staged:
    """A transfer between a file and `buffer`, which `finish` takes when it has come to a good end."""

    def __init__(self, transfer: Transfer, buffer: Tensor, finish: Callable[[Tensor], None]) -> None:
        self._transfer = transfer
        self._buffer: Tensor | None = buffer
        self._finish = finish

    @property
    def seconds(self) -> float | None:
        """From beginning to end of the file's part, once it has been waited for."""
        return self._transfer.seconds

    def wait(self) -> None:
        buffer, self._buffer = self._buffer, None  # the file's threads know its address only
        self._transfer.wait()
        if buffer is not None:
            self._finish(buffer)


class HostStore:
    """Owner of one host copy per region, page-locked where the device copies by itself. See `SwapFile`."""

    place = "in host memory"

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self._copier = copier_for(device)

    def add(self, nbytes: int) -> HostRegion:
        """A new region. Raises OffloadError if the host has no room for it."""
        region = HostRegion(nbytes, host_bytes(nbytes, pinned=self._copier.needs_pinned))
        self.nbytes += nbytes
        return region

    def write(self, region: HostRegion, storage: torch.UntypedStorage) -> Copied:
        """Begin to copy the storage, which must be left alone until the copy is waited for."""
        copy = self._copier.start(region.data, bytes_of(storage))
        return Copied(lambda: self._copier.finish(copy))  # whichever stream takes the memory over then

    def read(self, region: HostRegion, storage: torch.UntypedStorage) -> Copied:
        """Begin to fill the storage with what was written last."""
        copy = self._copier.start(bytes_of(storage), region.data)
        return Copied(lambda: self._copier.wait(copy))

    def close(self) -> None:
        """Regions live as long as someone has them."""


class StagedSwap:
    """A swap file for tensors of a device: they pass through host memory, which is used again and again."""

    place = "on disk"

    def __init__(self, swap: SwapFile, device: torch.device) -> None:
        self._swap = swap
        self._copier = copier_for(device)
        # What is in use is now of one size and now of another: to keep no more would be to lock memory again and again.
        self._pool = HostPool(pinned=self._copier.needs_pinned, most_kept=2.0)
        self._in_flight: list[tuple[Copy, Tensor]] = []  # buffers that copies to the device may still read

    @property
    def nbytes(self) -> int:
        return self._swap.nbytes

    def add(self, nbytes: int) -> Region:
        """A new region, with room reserved on the disk. Raises OffloadError."""
        return self._swap.add(nbytes)

    def write(self, region: Region, storage: torch.UntypedStorage) -> Staged:
        """Begin to write the storage, which is free when this returns."""
        staged = self._take(region.nbytes)
        staged.copy_(bytes_of(storage))  # waits: the file's threads know nothing of streams
        return Staged(self._swap.write(region, staged.untyped_storage()), staged, self._pool.give_back)

    def read(self, region: Region, storage: torch.UntypedStorage) -> Staged:
        """Begin to read what was written last; waiting for it fills the storage."""
        staged = self._take(region.nbytes)

        def fill(buffer: Tensor) -> None:
            copy = self._copier.start(bytes_of(storage), buffer)
            self._copier.wait(copy)
            self._in_flight.append((copy, buffer))

        return Staged(self._swap.read(region, staged.untyped_storage()), staged, fill)

    def close(self) -> None:
        """Give the disk's room and the host memory back."""
        self._swap.close()
        self._in_flight.clear()
        self._pool.clear()

    def _take(self, nbytes: int) -> Tensor:
        while self._in_flight and self._copier.is_done(self._in_flight[0][0]):  # they come to their ends in order
            self._pool.give_back(self._in_flight.pop(0)[1])
        return self._pool.take(nbytes)


def copier_for(device: torch.device) -> Copier:
    """How bytes move between the host and this device."""
    return Beside(device) if device.type == "cuda" else AtOnce()


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The storage's bytes as a tensor over the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
