"""Where a step's time goes: forward, backward, step, and the collectives within them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zerolith.comm import Comm, CommsLog, Timing

SHORT = {"all_gather": "gather", "reduce_scatter": "reduce"}


class Breakdown:
    """Sums up the seconds of phases until `restart`. On a GPU a phase ends when the device is done with it."""

    def __init__(self, comm: Comm, *, enabled: bool) -> None:
        self.enabled = enabled
        self._comm = comm
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._before: dict[str, Timing] = {}  # what the log of collectives held at the restart
        if enabled and comm.log is None:
            comm.log = CommsLog()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done in here."""
        if not self.enabled:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def line(self) -> str:
        """What was timed since `restart`, in milliseconds."""
        parts = [f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self._seconds.items()]
        if self._comm.log is not None:
            for op, timing in sorted(self._comm.log.by_op().items()):
                before = self._before.get(op, Timing())
                busy, hidden = timing.busy - before.busy, timing.hidden - before.hidden
                parts.append(f"{SHORT.get(op, op)} {1e3 * busy:.2f} ms ({1e3 * hidden:.2f} hidden)")
        return ", ".join(parts)

    def restart(self) -> None:
        """Begin anew; the log of collectives goes on."""
        self._seconds.clear()
        if self._comm.log is not None:
            self._before = self._comm.log.by_op()

    def _now(self) -> float:
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        return time.perf_counter()
