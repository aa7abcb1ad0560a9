"""The way between the device and masters that are far from it: gradients leave for them, and weights come back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from zerolith.departures import Departures
from zerolith.errors import OffloadError
from zerolith.gradients import Gradients
from zerolith.memory.lane import Copier

logger = logging.getLogger("zerolith")


class FarMasters:
    """Lets gradients of sections whose masters are in host memory, and stepped by element, leave before the step.

    Where the host has no memory for that, they go another way, which is slower.
    """

    def __init__(self, copier: Copier | None) -> None:
        self.departures = Departures(copier) if copier is not None else None  # None: all masters are beside the weights

    def has(self, own: Gradients) -> bool:
        """Whether a section is one of these."""
        main = own.section.main
        is_far = main is not None and own.section.is_offloaded and not main.shares_memory_with(own.section.weights)
        return is_far and self.departures is not None

    def send(self, own: Gradients) -> None:
        """Let a section's gradient leave, unless it has."""
        if self.departures is not None and self.has(own) and own.left is None:
            with _slower():
                own.leave(self.departures)

    def settle(self) -> None:
        """Give the device's memory back that gradients had which have left."""
        if self.departures is not None:
            self.departures.settle()

    def land(self, own: Gradients) -> None:
        """Make room on the host for what a step makes of the weights."""
        if self.departures is not None and self.has(own) and own.section.landing is None:
            with _slower():
                own.section.landing = self.departures.land(own.section.weights)


@contextmanager
def _slower() -> Iterator[None]:
    """What is done inside is faster than without, and can be left: no rank alone may fail for it."""
    try:
        yield
    except OffloadError as error:
        logger.warning("gradients and weights take a slower way between host and device: %s", error)
