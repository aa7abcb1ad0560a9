"""In which order units are gathered and reduced. Integers only; the same on every rank if the modules' order is."""

from __future__ import annotations


class Order:
    """Learns a sequence of unit numbers and predicts what comes next.

    The last pass is the prediction for this one. A pass that goes another way is followed as soon as it meets
    the known sequence again.
    """

    def __init__(self) -> None:
        self._known: list[int] = []
        self._seen: list[int] = []
        self._cursor = 0

    def restart(self) -> None:
        """A new pass begins."""
        if self._seen:
            self._known, self._seen = self._seen, []
        self._cursor = 0

    def visit(self, unit: int) -> int | None:
        """Note that `unit` is used now; returns the unit to expect next, if any is known."""
        self._seen.append(unit)
        try:
            self._cursor = self._known.index(unit, self._cursor) + 1
        except ValueError:
            return None
        return self._known[self._cursor] if self._cursor < len(self._known) else None

    def __str__(self) -> str:
        return " -> ".join(map(str, self._known))


class Sequencer:
    """Lets items go in one fixed order, whatever the order in which they become ready.

    Ranks must issue collectives in the same order. An item that is ready early waits for those before it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._next = 0
        self._ready: set[int] = set()

    def ready(self, item: int) -> list[int]:
        """Mark `item`; returns the items that may go now, in order."""
        self._ready.add(item)
        released = []
        while self._next in self._ready:
            released.append(self._next)
            self._next += 1
        return released

    def rest(self) -> list[int]:
        """The items that have not gone yet, in order; they count as gone."""
        left = list(range(self._next, self.size))
        self._next = self.size
        return left

    def restart(self) -> None:
        self._next = 0
        self._ready.clear()

    def has_gone(self, item: int) -> bool:
        return item < self._next
