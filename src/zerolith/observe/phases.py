"""Forward, backward and step, for whoever wants to time, count or trace them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

from zerolith.comm import Comm
from zerolith.config import Config
from zerolith.observe.breakdown import Breakdown
from zerolith.observe.flops import FlopsCount
from zerolith.observe.trace import Trace


class Watcher(Protocol):
    """Something that looks at the phases of a step."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around each forward, backward and step."""

    def stepped(self, done: int) -> None:
        """After each optimizer step; done: how many there were."""

    def remove(self) -> None:
        """The engine goes."""


class Phases:
    """The watchers that a config asks for; without any, nothing is done."""

    def __init__(self, config: Config, comm: Comm) -> None:
        self._watchers: list[Watcher] = []
        if config.wall_clock_breakdown:
            self._watchers.append(Breakdown(comm, every=config.steps_per_print or 1))
        if config.flops_profiler.enabled:
            self._watchers.append(FlopsCount(config.flops_profiler, comm, peak_tflops=config.zerolith.peak_tflops))
        if config.zerolith.trace.first_step is not None:
            self._watchers.append(Trace(config.zerolith.trace, comm))

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """A context to run the phase `name` in."""
        return self._all(name) if self._watchers else nullcontext()

    def stepped(self, done: int) -> None:
        for watcher in self._watchers:
            watcher.stepped(done)

    def remove(self) -> None:
        for watcher in self._watchers:
            watcher.remove()
        self._watchers.clear()

    @contextmanager
    def _all(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for watcher in self._watchers:
                stack.enter_context(watcher.phase(name))
            yield
