"""How long collectives take, and how much of that was hidden behind computing. Off unless somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


class _Waitable(Protocol):
    def wait(self) -> None: ...


@dataclass(slots=True)
class Timing:
    """Of all collectives of one operation and name."""

    count: int = 0
    sent: int = 0  # bytes by this rank
    hidden: float = 0.0  # seconds in which they went on behind what this rank did
    exposed: float = 0.0  # seconds in which this rank waited for them and took in what came

    @property
    def busy(self) -> float:
        return self.hidden + self.exposed

    def add(self, other: Timing) -> None:
        self.count, self.sent = self.count + other.count, self.sent + other.sent
        self.hidden, self.exposed = self.hidden + other.hidden, self.exposed + other.exposed


class CommsLog:
    """Owner of the timings since `clear`, by (operation, name); the name says which unit's buffer."""

    def __init__(self) -> None:
        self.timings: dict[tuple[str, str], Timing] = {}

    def watch(self, pending: _Waitable, works: Iterable[Any], *, op: str, name: str, sent: int) -> _Waitable:
        """`pending`, timed. works: torch's of the collective, which tell when they are done."""
        timing = self.timings.setdefault((op, name), Timing())
        timing.count += 1
        timing.sent += sent
        return _Timed(pending, works, timing)

    def by_op(self) -> dict[str, Timing]:
        """The timings of each operation."""
        found: dict[str, Timing] = {}
        for (op, _), timing in self.timings.items():
            found.setdefault(op, Timing()).add(timing)
        return found

    def clear(self) -> None:
        self.timings.clear()

    def table(self) -> str:
        """A line for each operation and unit, and one for each operation as a whole. GB/s are those that ranks send."""
        head = f"{'operation':<16} {'of':<28} {'count':>7} {'MB sent':>9} {'ms':>9} {'waited':>9}  hidden    GB/s"
        rows = [(op, name, timing) for (op, name), timing in sorted(self.timings.items())]
        rows += [(op, "all", timing) for op, timing in sorted(self.by_op().items())]
        return "\n".join([head, *(_line(*row) for row in rows)])


class _Timed:
    def __init__(self, pending: _Waitable, works: Iterable[Any], timing: Timing) -> None:
        self._pending = pending
        self._timing = timing
        self._begun = time.perf_counter()
        self._ended = 0.0
        for work in works:
            work.get_future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self._ended = time.perf_counter()  # of several works the last one's stays; on a thread of the backend

    def wait(self) -> None:
        start = time.perf_counter()
        self._pending.wait()
        self._timing.exposed += time.perf_counter() - start
        self._timing.hidden += (self._ended if 0 < self._ended < start else start) - self._begun


def _line(op: str, name: str, timing: Timing) -> str:
    hidden = timing.hidden / timing.busy if timing.busy else 0.0
    speed = timing.sent / timing.busy / 1e9 if timing.busy else 0.0
    return (
        f"{op:<16} {name:<28} {timing.count:>7} {timing.sent / 1e6:>9.2f} {1e3 * timing.busy:>9.1f} "
        f"{1e3 * timing.exposed:>9.1f} {hidden:>7.0%} {speed:>7.2f}"
    )
