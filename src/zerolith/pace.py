"""How fast a pass uses units and their shards are read, and so how many units to read ahead. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter

FIRST, MOST = 3, 8  # units: before anything is known, and the bound on what their shards take in memory


def units_ahead(read_s: float, between_s: float) -> int:
    """How many units' reads have to be under way so that none is waited for, from 1 to MOST.

    read_s: seconds from the beginning to the end of one unit's read. between_s: seconds between two units' uses.
    """
    if read_s <= 0:
        return 1
    if read_s >= (MOST - 1) * between_s:
        return MOST
    return math.ceil(read_s / between_s) + 1


class Pace:
    """The times of one pass over the units, forward or backward; those of the last pass say how far to read ahead.

    A rank's own affair: what is read ahead is local, and ranks may differ in how far.
    """

    def __init__(self, *, clock: Callable[[], float] = perf_counter) -> None:
        self.ahead = FIRST  # units
        self._clock = clock
        self._reads: list[float] = []  # seconds, of the units used in this pass
        self._between: list[float] = []  # seconds
        self._left: float | None = None  # when the last unit was there, and later by what was waited since

    def restart(self) -> None:
        """A new pass begins."""
        # A GPU copies from host memory by itself, and this process sees the end of a copy only if it waits for it. No
        # reads are known then, and the first value stands.
        if self._reads and self._between:
            self.ahead = units_ahead(median(self._reads), median(self._between))
        self._reads, self._between, self._left = [], [], None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What passes inside is no time between two uses."""
        began = self._clock()
        yield
        if self._left is not None:
            self._left += self._clock() - began

    def use(self, *, read_s: float | None) -> None:
        """A unit is there that was not; its read has taken so many seconds, or nobody knows how many."""
        now = self._clock()
        if self._left is not None:
            self._between.append(now - self._left)
        if read_s is not None:
            self._reads.append(read_s)
        self._left = now
