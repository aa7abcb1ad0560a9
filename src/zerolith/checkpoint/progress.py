"""How far something long has come."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[int, int], object]  # told of bytes done, and of bytes in all


class Meter:
    """Counts bytes, and tells after each count."""

    def __init__(self, tell: Tell | None, total: int) -> None:
        self._tell = tell
        self.total = total
        self._done = 0

    def __call__(self, count: int) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self.total)
