"""How many floating-point operations a step makes, and how well the device is used."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from zerolith.comm import Comm
from zerolith.config import FlopsProfiler

logger = logging.getLogger("zerolith")
# Dense bf16 TFLOP/s of a whole device, from its vendor's data sheet, by a part of its name.
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0}


class FlopsCount:
    """Counts the operations of one optimizer step by torch's counter, and times the one after it.

    Counting slows its own step down. What is computed again for activation checkpointing counts as done, so the share
    of the peak is of all that the device does (HFU), and equals MFU without recomputation.
    """

    def __init__(self, settings: FlopsProfiler, comm: Comm, *, peak_tflops: float | None) -> None:
        self._settings = settings
        self._comm = comm
        self._peak = peak_tflops or _known_peak(comm.device)
        self._done = 0  # optimizer steps of this run, which may have been resumed
        self._flops: Counter[str] = Counter()  # by phase
        self._tables: dict[str, list[str]] = {}  # by phase: of its last micro-batch
        self._start = 0.0
        self.report = ""  # once it is there

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done in here, if this is the step to be counted; steps count from 1."""
        if self._done + 1 != self._settings.profile_step or name == "step":
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops[name] += counter.get_total_flops()
        self._tables[name] = _table(name, counter, self._settings.module_depth)

    def stepped(self, done: int) -> None:
        """Start the clock after the step that was counted; report after the next one."""
        self._done += 1
        if self._done == self._settings.profile_step:
            self._start = self._now()
        elif self._done == self._settings.profile_step + 1 and self._flops:
            self._tell(self._now() - self._start)

    def remove(self) -> None:
        pass

    def _tell(self, seconds: float) -> None:
        total = sum(self._flops.values())
        phases = ", ".join(f"{name} {count / 1e12:.4g}" for name, count in self._flops.items())
        speed = total / seconds / 1e12
        share = f"{speed / self._peak:.1%} of {self._peak:g} TFLOP/s" if self._peak else "peak unknown"
        self.report = (
            f"step {self._settings.profile_step}: {total / 1e12:.4g} TFLOP per rank ({phases}); the next step made "
            f"{speed:.4g} TFLOP/s, {share}"
        )
        if self._comm.rank != 0:
            return
        logger.info("%s", self.report)
        if not self._settings.detailed:
            return
        text = "\n".join([self.report, *chain.from_iterable(self._tables.values())])
        if self._settings.output_file is None:
            logger.info("%s", text)
            return
        try:
            Path(self._settings.output_file).write_text(text + "\n")
        except OSError as error:
            logger.warning("flops_profiler.output_file: cannot be written (%s)\n%s", error, text)

    def _now(self) -> float:
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        return time.perf_counter()


def _table(phase: str, counter: FlopCounterMode, depth: int) -> list[str]:
    """A line for each module, and for each operation of the whole, of one micro-batch."""
    lines = [f"{phase:<40} {'GFLOP':>12}"]
    for module, by_op in counter.get_flop_counts().items():
        if module == "Global":
            lines += [f"  {op!s:<38} {count / 1e9:>12.4g}" for op, count in by_op.items()]
        elif depth < 0 or module.count(".") <= depth:
            lines.append(f"  {module:<38} {sum(by_op.values()) / 1e9:>12.4g}")
    return lines


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
