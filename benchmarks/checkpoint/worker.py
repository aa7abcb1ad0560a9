"""A rank's process. Obeys JSON lines on stdin and answers in JSON lines on what was stdout.

    {"do": "save", "path": p}     saves into the new folder p and answers with clocks and memory
    {"do": "forget"}              overwrites the state
    {"do": "load", "path": p}     loads, answers, and has compared the state with what was saved
    {"do": "close"}               leaves

A rank that fails prints its traceback to stderr and dies.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

from benchmarks.checkpoint.contenders import CONTENDERS, Adapter, Contender
from benchmarks.checkpoint.job import StoreJob
from benchmarks.engines import ENGINES
from benchmarks.measure import process_mb
from benchmarks.worker import Answers

RESET_PEAK = "5"  # what /proc/self/clear_refs takes as: VmHWM begins anew


class Holder:
    """One rank's state and its contender. Clocks are CLOCK_MONOTONIC, which the processes of a machine share."""

    def __init__(self, job: StoreJob) -> None:
        begin = time.perf_counter()
        self.job = job
        entry = CONTENDERS[job.contender]
        # cast: import_module cannot know what the module offers.
        adapter = cast(Adapter, importlib.import_module(entry.module))
        self.contender: Contender = adapter.build(job, **entry.options)
        self.contender.fill()
        self.start_s = time.perf_counter() - begin

    def description(self) -> dict[str, object]:
        return {
            "start_s": self.start_s,
            "state_bytes": self.contender.state_bytes(),
            "own_mb": process_mb("VmRSS"),
            "versions": _versions(self.job),
            "process_cpu_s": time.process_time(),
        }

    def save(self, path: Path) -> dict[str, float]:
        returned = 0.0

        def save() -> None:
            nonlocal returned
            self.contender.save(path)
            returned = time.perf_counter()
            self.contender.flush()

        return {**measured(save), "returned": returned}

    def load(self, path: Path) -> dict[str, float]:
        answer = measured(lambda: self.contender.load(path))
        self.contender.check()
        return answer


def measured(do: Callable[[], None]) -> dict[str, float]:
    """Runs it; its clocks and its memory, for which the process's peak is taken anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before_mb, cpu, begin = process_mb("VmRSS"), time.process_time(), time.perf_counter()
    do()
    end = time.perf_counter()
    cpu = time.process_time() - cpu
    return {"begin": begin, "end": end, "cpu_s": cpu, "before_mb": before_mb, "peak_mb": process_mb("VmHWM")}


def serve(holder: Holder, answers: Answers) -> None:
    """Until told to close, or until the driver is gone."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "close":
            holder.contender.close()
            return
        answer: dict[str, float] = {}
        if command["do"] == "forget":
            holder.contender.forget()
        elif command["do"] == "save":
            answer = holder.save(Path(command["path"]))
        else:
            answer = holder.load(Path(command["path"]))
        answers.send({**answer, "process_cpu_s": time.process_time()})


def _versions(job: StoreJob) -> dict[str, str]:
    """Of the interpreter and of the libraries that the contender has imported."""
    versions = {"python": platform.python_version()}
    for library in {"torch", ENGINES[job.engine].library} & set(sys.modules):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed, run from its source"
    return versions


def main() -> None:
    answers = Answers()
    try:
        if "torch" in sys.modules:
            raise RuntimeError("torch was imported before the contender; the floor would carry its memory.")
        holder = Holder(StoreJob.from_json(sys.argv[1]))
        answers.send(holder.description())
        serve(holder, answers)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a clean exit could wait for ranks that wait for this one


if __name__ == "__main__":
    main()
