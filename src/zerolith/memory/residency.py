"""Which sections' tensors are in memory: all of them, or those that are being used.

[Note: storages] What is not in memory has a storage of no bytes. Tensors and views of it stay the same objects, so
nobody who holds one must be told; but it must not be read outside `resident()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from zerolith.errors import OffloadError
from zerolith.memory.pages import ask_for_huge_pages

K = TypeVar("K")  # what stands for a section
K_contra = TypeVar("K_contra", contravariant=True)


class Moving(Protocol):
    """Reads or writes under way."""

    @property
    def seconds(self) -> float | None:
        """From the beginning to the end, once they were waited for; None where this process does not see the end."""
        ...

    def wait(self) -> None:
        """Let them end. Raises OffloadError if one has failed."""
        ...


class Store(Protocol):
    """Where tensors rest: SwapFile, HostStore, StagedSwap."""

    place: str  # in words

    @property
    def nbytes(self) -> int:
        """Of all regions."""
        ...

    def add(self, nbytes: int) -> Any:  # its own kind of region, which has `nbytes`
        """A new region. Raises OffloadError if there is no room."""
        ...

    def write(self, region: Any, storage: torch.UntypedStorage) -> Moving:
        """Begin to write the storage."""
        ...

    def read(self, region: Any, storage: torch.UntypedStorage) -> Moving:
        """Begin to fill the storage with what was written last."""
        ...

    def close(self) -> None:
        """Give all regions up."""
        ...


class Keeper(Protocol[K_contra]):
    """Who has a section's tensors."""

    def kept(self, own: K_contra) -> Iterable[Tensor]:
        """All of them, as they are now."""
        ...

    def show(self, own: K_contra) -> None:
        """They are in memory again: let others see them."""
        ...

    def hide(self, own: K_contra) -> None:
        """They are about to lose their memory: to read them would crash the process."""
        ...


@dataclass(eq=False)
class _Held:
    """One storage of a section, and where it lies in the store."""

    storage: torch.UntypedStorage
    region: Any  # of the store

    def allocate(self) -> None:
        """Give the storage its memory, unless it has it: to be resized would move it, whoever writes to it."""
        if self.storage.nbytes() != self.region.nbytes:
            self.storage.resize_(self.region.nbytes)
            if self.storage.device.type == "cpu":
                ask_for_huge_pages(self.storage.data_ptr(), self.region.nbytes)


def wait_for_all(moving: Iterable[Moving]) -> None:
    """Let all end, whatever becomes of some: they use memory. Raises the first error then."""
    error: OffloadError | None = None
    for each in moving:
        try:
            each.wait()
        except OffloadError as caught:
            error = error or caught
    if error is not None:
        raise error


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_turn(method: Method) -> Method:
    """Let one thread at a time into these methods of an object."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(Method, call)


class Residency(Generic[K]):
    """Owner of what is elsewhere: the tensors of those sections for which `goes` is true.

    The others are always in memory, and so is everything without a store; the methods do nothing for them. Threads may
    use different sections at once.
    """

    def __init__(self, store: Store | None, keeper: Keeper[K], *, goes: Callable[[K], bool] = lambda own: True) -> None:
        self._lock = RLock()
        self._store = store
        self._keeper = keeper
        self._goes = goes
        self._held: dict[K, dict[int, _Held]] = {}  # by storage
        self._reads: dict[K, list[Moving]] = {}  # under way
        self._writes: list[tuple[list[_Held], list[Moving]]] = []  # under way, the oldest first
        self._depth: dict[K, int] = {}  # users of what is in memory
        self._written: set[K] = set()  # in memory; the store has older values
        self._took: dict[K, float] = {}  # seconds, from the beginning to the end of the last read

    @property
    def is_swapped(self) -> bool:
        """Whether anything may be elsewhere."""
        return self._store is not None

    def swaps(self, own: K) -> bool:
        """Whether a section's tensors are elsewhere while nobody uses them."""
        return self._store is not None and self._goes(own)

    @property
    def place(self) -> str:
        """In words, where what is not in memory is."""
        return self._store.place if self._store is not None else ""

    @property
    def nbytes(self) -> int:
        """Bytes in the store."""
        return self._store.nbytes if self._store is not None else 0

    def read_seconds(self, own: K) -> float | None:
        """How long a section's last read took, from its beginning to its end; None if nobody knows."""
        return self._took.get(own)

    @_in_turn
    def prefetch(self, own: K) -> None:
        """Begin to bring a section's tensors into memory."""
        if self._store is None or own not in self._held or own in self._reads or self._depth.get(own):
            return
        self._settle_all(own)
        reads: list[Moving] = []
        try:
            for held in self._held[own].values():
                held.allocate()
                reads.append(self._store.read(held.region, held.storage))
        except OffloadError:
            with suppress(OffloadError):
                wait_for_all(reads)  # they use memory; whoever asks again gets all of it read again
            raise
        self._reads[own] = reads

    @contextmanager
    def readable(self, own: K) -> Iterator[None]:
        """A section's tensors are in memory inside. What is written to them is lost, unless in `resident` around it."""
        if not self.swaps(own):
            yield
            return
        self._enter(own)
        try:
            yield
        finally:
            if self._store is not None:  # else it was given up inside
                self._leave(own)

    @contextmanager
    def resident(self, own: K) -> Iterator[None]:
        """A section's tensors are in memory inside, and what was written to them is in the store some time after."""
        with self.readable(own):
            try:
                yield
            finally:
                if self.swaps(own):
                    self._written.add(own)

    @_in_turn
    def settle(self, *, but: int = 0) -> None:
        """Wait for writes, all but the newest `but` sections' of them, and give their memory back."""
        while len(self._writes) > but:
            written, transfers = self._writes[0]
            try:
                wait_for_all(transfers)
            except OffloadError:
                self._writes.pop(0)
                raise
            self._writes.pop(0)  # not before: after an interrupt they are under way still
            for held in written:
                held.storage.resize_(0)

    @_in_turn
    def abandon(self) -> None:
        """Give all tensors memory with undefined content, and the store up: after a failure, to come to an end."""
        held = dict(self._held)
        self.discard()
        for own, section in held.items():
            for each in section.values():
                each.allocate()
            if not self._depth.get(own):
                self._keeper.show(own)

    @_in_turn
    def discard(self) -> None:
        """Let the store go, and what is in it: nobody uses these tensors any more."""
        if self._store is None:
            return
        for _, transfers in self._writes:
            for transfer in transfers:
                with suppress(OffloadError):
                    transfer.wait()
        self._store.close()
        self._held.clear()
        self._reads.clear()
        self._writes.clear()
        self._store = None

    @_in_turn
    def close(self) -> None:
        """Bring everything back into memory and let the store go."""
        if self._store is None:
            return
        self.settle()
        for own in list(self._held):
            self._enter(own)
        self._held.clear()
        self._store.close()
        self._store = None

    @_in_turn
    def _enter(self, own: K) -> None:
        depth = self._depth.get(own, 0)
        if not depth:
            self.prefetch(own)
            reads = self._reads.pop(own, [])
            wait_for_all(reads)
            known = [each.seconds for each in reads if each.seconds is not None]
            if known:
                self._took[own] = max(known)
            if own in self._held:
                self._keeper.show(own)
        self._depth[own] = depth + 1

    @_in_turn
    def _leave(self, own: K) -> None:
        if self._depth[own] > 1 or self._store is None:  # given up meanwhile
            self._depth[own] -= 1
            return
        earlier = self._held.get(own, {})
        storages = {storage._cdata: storage for storage in map(Tensor.untyped_storage, self._keeper.kept(own))}
        added = {
            number: _Held(storage, self._store.add(storage.nbytes()))
            for number, storage in storages.items()
            if number not in earlier
        }
        self._depth[own] = 0  # not before there is a place for all of them
        known = [held for number, held in earlier.items() if number in storages]
        changed = [*added.values(), *(known if own in self._written else [])]
        self._written.discard(own)
        self._held[own] = {number: earlier.get(number) or added[number] for number in storages}
        self._keeper.hide(own)
        writes = [self._store.write(held.region, held.storage) for held in changed]
        for held in known:
            if held not in changed:
                held.storage.resize_(0)
        self._writes.append((changed, writes))
        self.settle(but=1)

    def _settle_all(self, own: K) -> None:
        """Let what is being written of a section come to its end, before it is read."""
        if any(held in written for written, _ in self._writes for held in self._held[own].values()):
            self.settle()
