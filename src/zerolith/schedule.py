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
        if self._seen and self._seen[-1] == unit:
            return self._expected()
        self._seen.append(unit)
        try:
            self._cursor = self._known.index(unit, self._cursor) + 1
        except ValueError:
            return None
        return self._expected()

    def expected(self, count: int) -> list[int]:
        """The next `count` units to expect, or as many as are known."""
        return self._known[self._cursor : self._cursor + count]

    def ends_with(self, unit: int) -> bool:
        """Whether `unit` was used last and nothing is expected after it."""
        return self._seen[-1:] == [unit] == self._known[-1:] and self._cursor == len(self._known)

    def _expected(self) -> int | None:
        return self._known[self._cursor] if self._cursor < len(self._known) else None

    def __str__(self) -> str:
        return " -> ".join(map(str, self._known))


class Sequencer:
    """Lets items go in one fixed order, whatever the order in which they become ready.

    Ranks must issue collectives in the same order. An item that is ready early waits for those before it. The
    order is 0, 1, 2, ... until `follow` sets another.
    """

    def __init__(self, size: int) -> None:
        self.order = list(range(size))
        self._gone = 0  # how many of `order`
        self._ready: dict[int, None] = {}  # a set that keeps the order of insertion

    def ready(self, item: int) -> list[int]:
        """Mark `item`; returns the items that may go now, in order."""
        self._ready.setdefault(item)
        start = self._gone
        while self._gone < len(self.order) and self.order[self._gone] in self._ready:
            self._gone += 1
        return self.order[start : self._gone]

    def rest(self) -> list[int]:
        """The items that have not gone yet, in order; they count as gone."""
        left = self.order[self._gone :]
        self._gone = len(self.order)
        return left

    def observed(self) -> list[int]:
        """All items as they became ready in this pass; those that never did come last."""
        return list(self._ready) + [item for item in self.order if item not in self._ready]

    def follow(self, order: list[int]) -> None:
        """Use `order`, a permutation, from the next pass on."""
        self.order = list(order)
        self._gone = len(order)

    def restart(self) -> None:
        self._gone = 0
        self._ready.clear()
