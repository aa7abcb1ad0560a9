"""Gradient sums that leave their device for host memory as they are complete, where their masters are stepped.

[Note: departures] A copy begins when its sum is there, and runs beside the backward that goes on. The memory that the
sum has on the device is given back once what is computed from then on would wait for the copy, so that at most MOST
sums are there. Who reads a sum on the host waits for its copy first. The results take the same way back: a step writes
them to a landing, in the dtype of the weights, and they are sent from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock

from torch import Tensor

from zerolith.buffer import FlatBuffer
from zerolith.memory.lane import Copier
from zerolith.memory.pool import HostPool
from zerolith.partitioning import SHARD

MOST = 2  # sums whose copies are under way


class Landing:
    """A shard's place in host memory, until it is given back."""

    def __init__(self, there: FlatBuffer, pool: HostPool, memory: Tensor) -> None:
        self.there = there
        self._pool = pool
        self._memory: Tensor | None = memory

    def give_back(self) -> None:
        """Nobody needs it any more."""
        if self._memory is not None:
            self._pool.give_back(self._memory)
            self._memory = None


class Departed:
    """A sum that is on its way to the host, or there."""

    def __init__(self, source: FlatBuffer, landing: Landing, copier: Copier) -> None:
        self._source: FlatBuffer | None = source  # kept for as long as it may be read
        self._landing = landing
        self._copier = copier
        self._copy = copier.start(landing.there.data, source.data)

    def arrived(self) -> FlatBuffer:
        """It, SHARD, in host memory. Waits for the copy."""
        self._copier.finish(self._copy)
        return self._landing.there

    def leave_behind(self) -> None:
        """What the device computes from now on may use the memory that it had there."""
        self._copier.wait(self._copy)
        self._source = None

    def give_back(self) -> None:
        """Nobody needs it any more. Waits for the copy: whoever gets the memory next writes to it at once."""
        self.leave_behind()
        self._copier.finish(self._copy)
        self._landing.give_back()


class Departures:
    """Sends sums to the host; owner of the host memory."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._pool = HostPool(pinned=copier.needs_pinned, most_kept=2.0)  # shards of the same sizes come in every step
        self._lock = Lock()  # of the pool: weights come back by another thread
        self._leaving: deque[tuple[Departed, Callable[[Departed], None]]] = deque()

    def send(self, sum_: FlatBuffer, *, free: Callable[[Departed], None]) -> Departed:
        """Begin to copy a SHARD buffer; `free` is called when its memory on the device may go."""
        self.settle(but=MOST - 1)
        departed = Departed(sum_, self.land(sum_), self._copier)
        self._leaving.append((departed, free))
        return departed

    def settle(self, *, but: int = 0) -> None:
        """Give the device's memory back, but that of the newest `but` sums."""
        while len(self._leaving) > but:
            departed, free = self._leaving.popleft()
            departed.leave_behind()
            free(departed)

    def land(self, like: FlatBuffer) -> Landing:
        """Room on the host for the SHARD of a buffer. Raises OffloadError if there is none."""
        shard = like.own()
        with self._lock:
            memory = self._pool.take(shard.data.nbytes)
        there = FlatBuffer(shard.layout, SHARD, memory.view(shard.data.dtype), rank=shard.rank)
        return Landing(there, self._pool, memory)
