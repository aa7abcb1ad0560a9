"""Where a step's time goes: forward, backward, step, and the collectives within them."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zerolith.comm import Comm, CommsLog, Timing

logger = logging.getLogger("zerolith")
SHORT = {"all_gather": "gather", "reduce_scatter": "reduce"}


class Breakdown:
    """Logs the seconds of each phase on rank 0, every `every` steps. On a GPU it waits for the device at their ends."""

    def __init__(self, comm: Comm, *, every: int) -> None:
        self._comm = comm
        self._every = every
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._log = comm.log = comm.log or CommsLog()
        self._before: dict[str, Timing] = {}  # what the log of collectives held when the last line was written

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done in here."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def stepped(self, done: int) -> None:
        """Tell what was timed since the last line, in milliseconds, and begin anew."""
        if done % self._every:
            return
        parts = [f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self._seconds.items()]
        after = self._log.by_op()
        for op, timing in sorted(after.items()):
            before = self._before.get(op, Timing())
            busy, hidden = timing.busy - before.busy, timing.hidden - before.hidden
            parts.append(f"{SHORT.get(op, op)} {1e3 * busy:.2f} ms ({1e3 * hidden:.2f} hidden)")
        if self._comm.rank == 0:
            logger.info("step %d: %s", done, ", ".join(parts))
        self._seconds.clear()
        self._before = after

    def remove(self) -> None:
        pass

    def _now(self) -> float:
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        return time.perf_counter()
