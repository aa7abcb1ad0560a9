"""Time: how long training has taken, and when it has to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAFETY = 1.5  # what is still to come may be this much slower than the same was before
WRITING_S = 8.0  # the picture and the other files


class Clock:
    """Seconds since the start, split into training and the rest.

    Says when training must stop so that the last evaluation and what was rehearsed still fit into `limit_s`.
    """

    def __init__(self, *, started: float, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._started = started  # on the scale of `now`
        self._limit_s = limit_s
        self._now = now
        self._window_began = now()
        self._slowest_window_s = 0.0
        self._slowest_pause_s = 0.0
        self._rehearsed_s = 0.0
        self.training_s = 0.0  # windows that have ended

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started

    def end_window(self) -> float:
        """Seconds of training since the last window or pause ended; a new window begins."""
        now = self._now()
        window_s, self._window_began = now - self._window_began, now
        self.training_s += window_s
        self._slowest_window_s = max(self._slowest_window_s, window_s)
        return window_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation, between two windows: what is done inside is not training."""
        began = self._now()
        yield
        self._window_began = self._now()
        self._slowest_pause_s = max(self._slowest_pause_s, self._window_began - began)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Do once, before training, what will be done again after it."""
        began = self._now()
        yield
        self._rehearsed_s += self._now() - began

    def must_stop(self) -> bool:
        """Whether, after one more window, what follows might not fit any more."""
        ahead_s = self._slowest_window_s + self._slowest_pause_s + self._rehearsed_s
        return self.elapsed_s + SAFETY * ahead_s + WRITING_S > self._limit_s
