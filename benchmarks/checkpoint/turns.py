"""Turn-taking: in every round, each contender starts, saves and loads a few times and ends, alone in the memory.

Every repeat goes alike for all: sync the machine; save into a new folder; sync its files; put them out of the page
cache; load; read them into the page cache, where memory allows; load again; remove them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import disk
from benchmarks.checkpoint.contenders import CONTENDERS
from benchmarks.checkpoint.job import StoreJob
from benchmarks.fleet import Answer, Host, Ranks, TimeIsUpError, WorkerDiedError
from benchmarks.interleave import turn_order
from benchmarks.measure import busy_s

COLD_AT_MOST = 0.01  # of the files in the page cache, to call a load cold
WARM_AT_LEAST = 0.99
SPARE_BYTES = 10**9  # of memory, beside a warm page cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One save and its loads. Seconds run from the first rank's begin to the last rank's end."""

    contender: str
    round: int
    number: int  # within the turn
    stall_s: float  # until the training could go on
    save_s: float  # until the files were safe on disk
    cold_s: float
    warm_s: float | None  # None: the files do not fit into memory beside the state
    disk_bytes: int
    save_mb: float  # peak of the process less what it had before, the rank with the largest difference
    load_mb: float
    foreign_cores: float  # processors busy outside of the ranks, on average; the system's writing of pages counts
    answers: dict[str, list[Answer]]  # per rank, by "save", "cold", "warm"; none where not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything measured in a run."""

    starts: dict[str, list[Answer]]  # of each contender's last turn, per rank
    repeats: list[Repeat]


class StoreRanks(Ranks):
    """The processes of one contender."""

    def _spawn(self, rank: int) -> subprocess.Popen[str]:
        python = self.host.python_for(self.job)
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [python, "-m", "benchmarks.checkpoint.worker", self.job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._environment(rank, python)},
                start_new_session=True,
            )


def run(
    jobs: Sequence[StoreJob],
    host: Host,
    folder: Path,
    *,
    num_rounds: int,
    num_repeats: int,
    say: Callable[[str], None],
) -> Record:
    """Hands out turns below `folder`, which is empty again afterwards."""
    by_name = {job.contender: job for job in jobs}
    starts: dict[str, list[Answer]] = {}
    repeats: list[Repeat] = []
    for round_index in range(num_rounds):
        for name in turn_order(list(by_name), round_index):
            ranks = StoreRanks(by_name[name], host)
            try:
                turn = Turn(ranks, by_name[name], folder, round_index=round_index)
                starts[name] = turn.starts
                repeats += [turn.repeat(number) for number in range(num_repeats)]
                ranks.close()
            except (WorkerDiedError, TimeIsUpError) as error:  # which knows the engine, not the contender
                raise type(error)(f"{name}: {error}") from error
            finally:
                ranks.kill()
            say(f"round {round_index + 1} of {num_rounds}: {name}, saved in {repeats[-1].save_s:.2f} s")
    return Record(starts=starts, repeats=repeats)


class Turn:
    """One contender's turn: its ranks, the folder of its checkpoints and how busy the machine is beside them."""

    def __init__(self, ranks: Ranks, job: StoreJob, folder: Path, *, round_index: int) -> None:
        self.ranks = ranks
        self.job = job
        self.round_index = round_index
        self.home = folder / job.contender
        self.starts = ranks.start()
        self._own_s = self._used_s(self.starts)

    def repeat(self, number: int) -> Repeat:
        self.home.mkdir()
        path = self.home / f"save{number}"
        begin, busy, used = time.perf_counter(), busy_s(), self._own_s
        os.sync()
        saved = self._ask("save", path)
        disk.sync(self.home)
        synced = time.perf_counter()
        disk_bytes = disk.size_of(path)
        cold, warm = self._load_cold(path), self._load_warm(path, disk_bytes)
        seconds, busy = time.perf_counter() - begin, busy_s() - busy
        shutil.rmtree(self.home)
        start = min(answer["begin"] for answer in saved)
        return Repeat(
            contender=self.job.contender,
            round=self.round_index,
            number=number,
            stall_s=max(answer["returned"] for answer in saved) - start,
            save_s=(_end(saved) if CONTENDERS[self.job.contender].syncs else synced) - start,
            cold_s=_seconds(cold),
            warm_s=_seconds(warm) if warm else None,
            disk_bytes=disk_bytes,
            save_mb=_above_mb(saved),
            load_mb=_above_mb(cold),
            foreign_cores=max(0.0, (busy - (self._own_s - used)) / seconds),
            answers={"save": saved, "cold": cold, "warm": warm},
        )

    def _load_cold(self, path: Path) -> list[Answer]:
        self._ask("forget", path)
        stayed, is_memory = disk.drop_cache(self.home), disk.file_system(self.home) in disk.IN_MEMORY
        if stayed > COLD_AT_MOST and not is_memory:
            raise RuntimeError(f"{self.job.contender}: {stayed:.0%} of its files stay in the page cache when put out.")
        return self._ask("load", path)

    def _load_warm(self, path: Path, disk_bytes: int) -> list[Answer]:
        """Empty where memory does not hold the files beside the state."""
        if disk.available_bytes() < disk_bytes + SPARE_BYTES:
            return []
        self._ask("forget", path)
        return self._ask("load", path) if disk.warm_cache(path) >= WARM_AT_LEAST else []

    def _ask(self, do: str, path: Path) -> list[Answer]:
        answers = self.ranks.ask({"do": do, "path": str(path)})
        self._own_s = self._used_s(answers)
        return answers

    @staticmethod
    def _used_s(answers: Sequence[Answer]) -> float:
        """Processor seconds of the ranks and of this process, so far."""
        return time.process_time() + sum(answer["process_cpu_s"] for answer in answers)


def _end(answers: Sequence[Answer]) -> float:
    return float(max(answer["end"] for answer in answers))


def _seconds(answers: Sequence[Answer]) -> float:
    return _end(answers) - min(answer["begin"] for answer in answers)


def _above_mb(answers: Sequence[Answer]) -> float:
    return float(max(answer["peak_mb"] - answer["before_mb"] for answer in answers))
