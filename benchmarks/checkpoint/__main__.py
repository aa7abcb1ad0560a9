"""Saves and loads of zerolith beside torch.save, DCP, DeepSpeed and plain writing, interleaved in one run.

python -m benchmarks.checkpoint --size 125m --world 2
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.checkpoint import disk, report
from benchmarks.checkpoint.contenders import CONTENDERS, DEFAULT
from benchmarks.checkpoint.job import SIZES, StoreJob
from benchmarks.checkpoint.turns import Record, run
from benchmarks.fleet import ROOT, TimeIsUpError, WorkerDiedError
from benchmarks.measure import git_state, hardware, shown_command
from benchmarks.step_time import RESULTS, make_host, say, stop_on

MODULE = "benchmarks.checkpoint"
PROCESS_BYTES = 6 * 10**8  # of a rank that has imported torch
DISK_FACTOR = 2.2  # of the state: DeepSpeed writes weights twice


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, checked."""

    jobs: list[StoreJob]
    left_out: list[str]  # contenders that do not fit into memory
    world: int
    num_rounds: int
    num_repeats: int

    @property
    def title(self) -> str:
        job, ranks = self.jobs[0], "1 rank" if self.world == 1 else f"{self.world} ranks"
        return f"{job.size}: {job.state_bytes / 1e9:.2f} GB of state on {ranks}, {self.num_rounds} rounds"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__.split("\n")[0])
    parser.add_argument("--contenders", default=DEFAULT, help=",".join(CONTENDERS))
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--world", type=int, default=2, help="ranks per contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each turn; the first of several is not counted")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--memory-gb", type=float, help="contenders that need more are left out; default: 85 %%")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of a rank")
    parser.add_argument("--deepspeed-python", default=sys.executable, help="interpreter that has DeepSpeed")
    parser.add_argument("--max-minutes", type=float, default=30.0, help="the run fails when it takes longer")
    parser.add_argument("--json", type=Path, help="where to write all samples; default: benchmarks/results/")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def needed_bytes(job: StoreJob, world: int) -> float:
    """Memory of all ranks of a contender at its worst moment."""
    entry = CONTENDERS[job.contender]
    return (entry.memory + world * entry.memory_per_rank) * job.state_bytes + world * PROCESS_BYTES


def make_plan(arguments: argparse.Namespace, *, memory_bytes: float) -> Plan:
    """Exits with a message where the arguments do not fit."""
    names = list(dict.fromkeys(arguments.contenders.split(",")))
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise SystemExit(f"unknown contender {unknown[0]!r}; choose from {', '.join(CONTENDERS)}.")
    if min(arguments.rounds, arguments.repeats, arguments.world) < 1:
        raise SystemExit("--rounds, --repeats and --world are at least 1.")
    jobs = [StoreJob.of(name, arguments.size) for name in names]
    fitting = [job for job in jobs if needed_bytes(job, arguments.world) <= memory_bytes]
    if not any(CONTENDERS[job.contender].is_floor for job in fitting):
        floors = [name for name, entry in CONTENDERS.items() if entry.is_floor]
        raise SystemExit(f"no floor that fits into memory is among the contenders; add one of {', '.join(floors)}.")
    return Plan(
        jobs=fitting,
        left_out=[job.contender for job in jobs if job not in fitting],
        world=arguments.world,
        num_rounds=arguments.rounds,
        num_repeats=arguments.repeats,
    )


def check_folder(folder: Path, state_bytes: int) -> str:
    """The type of its file system; says what speaks against it. Exits where the state does not fit."""
    if not folder.is_dir():
        raise SystemExit(f"--folder {folder}: it is not a folder.")
    kind, free = disk.file_system(folder), shutil.disk_usage(folder).free
    if kind in disk.IN_MEMORY:
        say(f"warning: {folder} is on {kind}, which is memory: these are no times of a disk. See --folder.")
    if free < DISK_FACTOR * state_bytes:
        raise SystemExit(
            f"--folder {folder}: {free / 1e9:.1f} GB are free, and {DISK_FACTOR * state_bytes / 1e9:.1f} are needed."
        )
    return kind


def notes_on(plan: Plan, floors: report.Floors, machine: dict[str, object], kind: str, limit_gb: float) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {kind}. The floor is the fastest "
        f"plain way of this run: {floors.save} to save, {floors.load} to load.",
        "save MB, load MB: the peak of a process above what it had before, the larger of the ranks; pages of a mapped "
        "file count. foreign cores: processors busy outside of the ranks; the system's own writing counts.",
    ]
    if kind in disk.IN_MEMORY:
        notes.append(f"{kind} is memory: these are no times of a disk.")
    unsynced = [job.contender for job in plan.jobs if not CONTENDERS[job.contender].syncs]
    if unsynced:
        notes.append(
            f"{report.UNSYNCED} {', '.join(unsynced)} return before their files are safe; their stall is this moment, "
            "and their GB/s count the fsync that follows."
        )
    if plan.left_out:
        needs = (
            f"{name} {needed_bytes(StoreJob.of(name, plan.jobs[0].size), plan.world) / 1e9:.0f}"
            for name in plan.left_out
        )
        notes.append(f"Left out, for they need more than {limit_gb:.0f} GB of memory: {', '.join(needs)}.")
    return notes


def describe(plan: Plan, arguments: argparse.Namespace, record: Record, argv: Sequence[str]) -> dict[str, object]:
    """Everything in a result but the numbers."""
    job = plan.jobs[0]
    return {
        "title": plan.title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **git_state(ROOT),
        "command": shown_command(MODULE, argv),
        "hardware": hardware(),
        "file_system": disk.file_system(arguments.folder),
        "versions": {name: answers[0]["versions"] for name, answers in record.starts.items()},
        "settings": {
            **{name: getattr(arguments, name) for name in ("size", "world", "rounds", "repeats", "threads")},
            "num_params": job.num_params,
            "state_bytes": job.state_bytes,
            "left_out": plan.left_out,
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    # float: hardware() holds values of several types.
    limit_gb = arguments.memory_gb or 0.85 * float(str(hardware()["memory_gb"]))
    plan = make_plan(arguments, memory_bytes=1e9 * limit_gb)
    kind = check_folder(arguments.folder, plan.jobs[0].state_bytes)
    signal.signal(signal.SIGTERM, stop_on)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as home:
        logs, data = Path(home) / "logs", Path(home) / "data"
        logs.mkdir()
        data.mkdir()
        try:
            host = make_host(arguments, logs)
            record = run(plan.jobs, host, data, num_rounds=plan.num_rounds, num_repeats=plan.num_repeats, say=say)
        except (WorkerDiedError, TimeIsUpError) as error:
            say(str(error))
            return 1
    floors = report.choose_floors(report.counted(record, num_repeats=plan.num_repeats))
    rows = report.summarise(record, state_bytes=plan.jobs[0].state_bytes, num_repeats=plan.num_repeats, floors=floors)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    default = RESULTS / f"{stamp}-checkpoint-{arguments.size}-w{arguments.world}.json"
    report.write(arguments.json or default, describe(plan, arguments, record, argv), record, rows)
    notes = notes_on(plan, floors, hardware(), kind, limit_gb)
    table = report.markdown(rows, floors=floors, title=plan.title, notes=notes)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
