"""Where tensors of a device go while nobody needs them: host memory, or through it a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zerolith.errors import OffloadError
from zerolith.memory.lane import AtOnce, Beside, Copier
from zerolith.memory.swap import Region, SwapFile


@dataclass(eq=False)
class HostRegion:
    """A tensor's place in host memory."""

    nbytes: int
    data: Tensor = field(repr=False)  # uint8


class Copied:
    """A copy under way. `wait()` lets what the device is given from then on run after it; `held` stays until then."""

    def __init__(self, wait: Callable[[], None], *, held: Tensor | None = None) -> None:
        self._wait = wait
        self._held = held

    def wait(self) -> None:
        self._wait()
        self._held = None


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
    """A swap file for tensors of a device: they pass through host memory of their own."""

    place = "on disk"

    def __init__(self, swap: SwapFile, device: torch.device) -> None:
        self._swap = swap
        self._copier = copier_for(device)

    @property
    def nbytes(self) -> int:
        return self._swap.nbytes

    def add(self, nbytes: int) -> Region:
        """A new region, with room reserved on the disk. Raises OffloadError."""
        return self._swap.add(nbytes)

    def write(self, region: Region, storage: torch.UntypedStorage) -> Copied:
        """Begin to write the storage, which is free when this returns."""
        staged = host_bytes(region.nbytes, pinned=self._copier.needs_pinned)
        staged.copy_(bytes_of(storage))  # waits: the file's threads know nothing of streams
        transfer = self._swap.write(region, staged.untyped_storage())
        return Copied(transfer.wait, held=staged)

    def read(self, region: Region, storage: torch.UntypedStorage) -> Copied:
        """Begin to read what was written last; waiting for it fills the storage."""
        staged = host_bytes(region.nbytes, pinned=self._copier.needs_pinned)
        transfer = self._swap.read(region, staged.untyped_storage())

        def finish() -> None:
            transfer.wait()
            self._copier.wait(self._copier.start(bytes_of(storage), staged))

        return Copied(finish)

    def close(self) -> None:
        """Give the disk's room back."""
        self._swap.close()


def copier_for(device: torch.device) -> Copier:
    """How bytes move between the host and this device."""
    return Beside(device) if device.type == "cuda" else AtOnce()


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The storage's bytes as a tensor over the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def host_bytes(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory, page-locked if told. Raises OffloadError if there is none."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where there is no memory
        raise OffloadError(f"the host has no room for {nbytes} bytes that are to be offloaded: {error}") from error
