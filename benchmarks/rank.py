"""One rank of one engine: the engine, its data and its clocks. Knows no driver."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from itertools import pairwise
from typing import cast

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bf16_products import Fp32Products
from benchmarks.engines import ENGINES, Adapter, Engine
from benchmarks.gpt import build_model, make_batch
from benchmarks.job import Job
from benchmarks.measure import process_mb

PROFILE_ROWS = 25


class Clock:
    """Marks on a device's own time line: events on CUDA, so that marking does not wait; else wall time."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None
        self._times_s: list[float] = []

    def mark(self) -> None:
        if self._events is None:
            self._times_s.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def spans_ms(self) -> list[float]:
        """Times between marks. Call it after a synchronize."""
        if self._events is None:
            return [1e3 * (end - begin) for begin, end in pairwise(self._times_s)]
        return [begin.elapsed_time(end) for begin, end in pairwise(self._events)]


class Rank:
    """Starts an engine and runs its steps."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.job = job
        self.rank = int(os.environ["RANK"])
        self.device = choose_device(job.device)
        self.step_count = 0
        self.engine: Engine
        self._products = Fp32Products() if job.products == "fp32" else None

    def start(self) -> dict[str, object]:
        """Imports the library, meets the other ranks, builds the engine. Collective."""
        entry = ENGINES[self.job.engine]
        marks = [time.perf_counter()]
        importlib.import_module(entry.library)
        # cast: import_module cannot know what the module offers.
        adapter = cast(Adapter, importlib.import_module(entry.adapter))
        marks.append(time.perf_counter())
        adapter.rendezvous(self.device)
        marks.append(time.perf_counter())
        model = build_model(self.job)
        num_params = sum(param.numel() for param in model.parameters())
        self.engine = adapter.build(self.job, model, self.device, **entry.options)
        self._synchronize()
        marks.append(time.perf_counter())
        return {
            "import_s": marks[1] - marks[0],
            "rendezvous_s": marks[2] - marks[1],
            "build_s": marks[3] - marks[2],
            "num_params": num_params,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "versions": _versions(entry.library),
            **self.memory(),
        }

    def train(self, num_steps: int) -> list[dict[str, float]]:
        return [self._step() for _ in range(num_steps)]

    def profile(self, num_steps: int) -> str:
        """The operators with most self time. Other ranks take the same steps unobserved."""
        if self.rank != 0:
            self.train(num_steps)
            return ""
        activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
        if self.device.type == "cuda":
            activities, key = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
        with profile(activities=activities) as profiler:
            self.train(num_steps)
        averages = profiler.key_averages()
        return averages.table(sort_by=key, row_limit=PROFILE_ROWS, max_name_column_width=60)

    def memory(self) -> dict[str, float]:
        """MB of this process, or of its allocator on the device."""
        if self.device.type == "cuda":
            peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            return {"peak_mb": peak / 1e6, "steady_mb": now / 1e6}
        return {"peak_mb": process_mb("VmHWM"), "steady_mb": process_mb("VmRSS")}

    def _step(self) -> dict[str, float]:
        """One training step. Data is made and the loss is read outside of the timed part."""
        batch = make_batch(self.job, step=self.step_count, rank=self.rank)
        x, y = batch.x.to(self.device), batch.y.to(self.device)
        clock = Clock(self.device)
        products_s = self._products.seconds if self._products else 0.0
        self._synchronize()
        begin, cpu, process = time.perf_counter(), time.thread_time(), time.process_time()
        clock.mark()
        loss = self.engine.forward(x, y)
        clock.mark()
        self.engine.backward(loss)
        clock.mark()
        self.engine.step()
        clock.mark()
        self._synchronize()
        wall, cpu, process = (
            time.perf_counter() - begin,
            time.thread_time() - cpu,
            time.process_time() - process,
        )
        self.step_count += 1
        forward_ms, backward_ms, step_ms = clock.spans_ms()
        counted = {"products_ms": 1e3 * (self._products.seconds - products_s)} if self._products else {}
        return {
            "wall_ms": 1e3 * wall,
            "forward_ms": forward_ms,
            "backward_ms": backward_ms,
            "step_ms": step_ms,
            "cpu_ms": 1e3 * cpu,  # main thread
            "other_threads_ms": 1e3 * (process - cpu),  # gloo; autograd on CUDA
            "loss": float(loss),
            **counted,
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def choose_device(kind: str) -> torch.device:
    """`kind`: cpu or cuda. One CUDA device per local rank."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _versions(library: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if library != "torch":
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed, run from its source"
    return versions
