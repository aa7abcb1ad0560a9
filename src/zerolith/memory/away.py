"""Bytes that leave their device for a while: tensors and views of them stay the same objects."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from torch import Tensor

from zerolith.memory.host_store import bytes_of
from zerolith.memory.pinned import host_bytes


class Away:
    """Owner of the host copies of storages that have no memory until `bring_back`.

    Nobody may read a tensor in between: it would crash the process.
    """

    def __init__(self, kinds: Set[str] = frozenset(), *, pinned: bool = False) -> None:
        self.kinds = frozenset(kinds)  # of states, for those who ask what is away
        self.pinned = pinned
        self._copies: list[tuple[torch.UntypedStorage, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for _, copy in self._copies)

    @torch.no_grad()
    def send(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of `tensors` to the host and let their memory go; one that has none is left out.

        Raises OffloadError if the host has no room for all; all are as they were then.
        """
        copies = []
        for storage in {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values():
            if storage.nbytes():
                copy = host_bytes(storage.nbytes(), pinned=self.pinned)
                copy.copy_(bytes_of(storage), non_blocking=self.pinned)
                copies.append((storage, copy))
        _wait({storage.device for storage, _ in copies})
        for storage, _ in copies:
            storage.resize_(0)
        self._copies += copies

    @torch.no_grad()
    def bring_back(self) -> None:
        """Give every storage its memory and bytes again. Raises RuntimeError where there is no room; call it again."""
        brought = []  # until the device has read them: to let one go would wait for it
        try:
            while self._copies:
                storage, copy = self._copies[-1]
                storage.resize_(copy.nbytes)
                bytes_of(storage).copy_(copy, non_blocking=self.pinned)
                brought.append(self._copies.pop())
        finally:
            _wait({storage.device for storage, _ in brought})


def _wait(devices: Iterable[torch.device]) -> None:
    """Copies are done, and so host memory may go; freed device memory goes to whoever asks the driver."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
