"""Time: how fast training is, and when it has to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SAFETY = 1.5  # later work may be this much slower than the same work was


class Clock:
    """Seconds since the start, split into training and the rest.

    Training must stop while what follows it still fits into `limit_s`: the clock takes for that as long as
    the rest has taken on the way here.
    """

    def __init__(self, *, started: float, limit_s: float, closing_s: float) -> None:
        self._started = started  # on time.monotonic's scale
        self._limit_s = limit_s
        self._closing_s = closing_s  # evaluation, sampling and writing after the last step
        self._training_s = 0.0
        self._resumed = time.monotonic()
        self._slowest_window_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def training_s(self) -> float:
        """Seconds of training up to the last `end_window`."""
        return self._training_s

    def end_window(self) -> float:
        """Seconds of training since the last window or pause ended; a new window begins."""
        now = time.monotonic()
        window_s, self._resumed = now - self._resumed, now
        self._training_s += window_s
        self._slowest_window_s = max(self._slowest_window_s, window_s)
        return window_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training; call it right after `end_window`."""
        began = time.monotonic()
        yield
        self._resumed = time.monotonic()
        self._closing_s = max(self._closing_s, self._resumed - began)

    def must_stop(self) -> bool:
        """Whether one more window like the slowest could take what follows beyond the limit."""
        return self.elapsed_s + SAFETY * (self._slowest_window_s + self._closing_s) > self._limit_s
