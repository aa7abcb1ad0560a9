"""Which sections' masters and optimizer states are in memory: all of them, or those that are being stepped.

[Note: storages] What is not in memory has a storage of no bytes. Tensors and views of it stay the same objects, so
nobody who holds one must be told; but it must not be read outside `resident()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zerolith.errors import OffloadError
from zerolith.gradients import Gradients
from zerolith.memory import Region, SwapFile, Transfer


class Keeper(Protocol):
    """Who has a section's masters and states."""

    def kept(self, own: Gradients) -> Iterable[Tensor]:
        """All of them, as they are now."""
        ...

    def show(self, own: Gradients) -> None:
        """They are in memory again: let others see them."""
        ...

    def hide(self, own: Gradients) -> None:
        """They are about to lose their memory: to read them would crash the process."""
        ...


@dataclass(eq=False)
class _Held:
    """One storage of a section, and where it lies in the file."""

    storage: torch.UntypedStorage
    region: Region


class Residency:
    """Owner of what is on disk. Without a file everything is always in memory, and every method does nothing."""

    def __init__(self, swap: SwapFile | None, keeper: Keeper) -> None:
        self._swap = swap
        self._keeper = keeper
        self._held: dict[Gradients, dict[int, _Held]] = {}  # by storage
        self._reads: dict[Gradients, list[Transfer]] = {}  # under way
        self._writes: list[tuple[list[_Held], list[Transfer]]] = []  # under way, the oldest first
        self._depth: dict[Gradients, int] = {}  # users of what is in memory
        self._written: set[Gradients] = set()  # in memory; the file has older values

    @property
    def is_swapped(self) -> bool:
        return self._swap is not None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._swap.nbytes if self._swap is not None else 0

    def prefetch(self, own: Gradients) -> None:
        """Begin to bring a section's tensors into memory."""
        if self._swap is None or own not in self._held or own in self._reads or self._depth.get(own):
            return
        self._settle_all(own)
        reads = []
        for held in self._held[own].values():
            held.storage.resize_(held.region.nbytes)
            reads.append(self._swap.read(held.region, held.storage))
        self._reads[own] = reads

    @contextmanager
    def readable(self, own: Gradients) -> Iterator[None]:
        """A section's tensors are in memory inside. What is written to them is lost, unless in `resident` around it."""
        if self._swap is None:
            yield
            return
        self._enter(own)
        try:
            yield
        finally:
            if self._swap is not None:  # else it was given up inside
                self._leave(own)

    @contextmanager
    def resident(self, own: Gradients) -> Iterator[None]:
        """A section's tensors are in memory inside, and what was written to them is on disk some time after."""
        with self.readable(own):
            try:
                yield
            finally:
                self._written.add(own)

    def settle(self, *, but: int = 0) -> None:
        """Wait for writes, all but the newest `but` sections' of them, and give their memory back."""
        while len(self._writes) > but:
            written, transfers = self._writes.pop(0)
            for transfer in transfers:
                transfer.wait()
            for held in written:
                held.storage.resize_(0)

    def abandon(self) -> None:
        """Give all tensors memory with undefined content, and the file up: after a failure, to come to an end."""
        if self._swap is None:
            return
        for _, transfers in self._writes:
            for transfer in transfers:
                with suppress(OffloadError):
                    transfer.wait()
        self._swap.close()
        for own, section in self._held.items():
            for held in section.values():
                held.storage.resize_(held.region.nbytes)
            if not self._depth.get(own):
                self._keeper.show(own)
        self._held.clear()
        self._reads.clear()
        self._writes.clear()
        self._swap = None

    def close(self) -> None:
        """Bring everything back into memory and let the file go."""
        if self._swap is None:
            return
        self.settle()
        for own in list(self._held):
            self._enter(own)
        self._held.clear()
        self._swap.close()
        self._swap = None

    def _enter(self, own: Gradients) -> None:
        depth = self._depth.get(own, 0)
        if not depth:
            self.prefetch(own)
            for read in self._reads.get(own, []):
                read.wait()
            self._reads.pop(own, None)
            if own in self._held:
                self._keeper.show(own)
        self._depth[own] = depth + 1

    def _leave(self, own: Gradients) -> None:
        self._depth[own] -= 1
        if self._depth[own]:
            return
        assert self._swap is not None, "who enters without a file does not come here"
        earlier = self._held.get(own, {})
        storages = {storage._cdata: storage for storage in map(Tensor.untyped_storage, self._keeper.kept(own))}
        added = {
            number: _Held(storage, self._swap.add(storage.nbytes()))
            for number, storage in storages.items()
            if number not in earlier
        }
        known = [held for number, held in earlier.items() if number in storages]
        changed = [*added.values(), *(known if own in self._written else [])]
        self._written.discard(own)
        self._held[own] = {number: earlier.get(number) or added[number] for number in storages}
        self._keeper.hide(own)
        writes = [self._swap.write(held.region, held.storage) for held in changed]
        for held in known:
            if held not in changed:
                held.storage.resize_(0)
        self._writes.append((changed, writes))
        self.settle(but=1)

    def _settle_all(self, own: Gradients) -> None:
        """Let what is being written of a section come to its end, before it is read."""
        if any(held in written for written, _ in self._writes for held in self._held[own].values()):
            self.settle()
