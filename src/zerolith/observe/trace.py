"""A trace of some steps, by torch's profiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function

from zerolith.comm import Comm
from zerolith.config import TraceSteps
from zerolith.errors import ConfigError

logger = logging.getLogger("zerolith")


class Trace:
    """Writes `<folder>/rank<r>.json`, to be opened in Perfetto or chrome://tracing, of steps first_step to last_step.

    Steps count from 1. A trace that is under way when the engine is destroyed is written then.
    """

    def __init__(self, settings: TraceSteps, comm: Comm) -> None:
        assert settings.first_step is not None, "made only where a trace is asked for"
        self._first = settings.first_step
        self._last = settings.last_step if settings.last_step is not None else self._first
        self._path = Path(settings.folder) / f"rank{comm.rank}.json"
        self._profiler: profile | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"zerolith.trace.folder: {self._path.parent} cannot be made ({error})") from error
        self.stepped(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is done in here in the trace."""
        if self._profiler is None:
            yield
            return
        with record_function(f"zerolith {name}"):
            yield

    def stepped(self, done: int) -> None:
        """Begin after the step before the first, end after the last."""
        if self._profiler is not None and done >= self._last:
            self.remove()
        elif self._profiler is None and self._first <= done + 1 <= self._last:
            self._profiler = profile(record_shapes=True)
            self._profiler.start()

    def remove(self) -> None:
        """End what is under way and write it."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
            logger.info("trace written to %s", self._path)
