"""Saves worth interrupting: what was there before, what is saved, and both as content of ranks without engines."""

from __future__ import annotations

import functools
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from faults.disks import DeadlyDisk, FaultyDisk, Op
from faults.jobs import Job, run_job
from faults.pipes import Links, PipeComm, close_links, make_links
from faults.states import NOTHING, checkpoint_digest, record_jobs, redirected, solo_saver
from zerolith.checkpoint import Content, Disk, Kept, Saver

WORLD = 2
STEPS = 4  # the last is for a save after the fault


class Save(NamedTuple):
    """Of the state after `step`."""

    tag: str
    step: int
    kept: Kept = Kept()


class Scenario(NamedTuple):
    """The save that is interrupted, and those that were done before it."""

    before: tuple[Save, ...]
    last: Save


SCENARIOS = {
    "first": Scenario((), Save("global_step1", 1)),
    "later": Scenario((Save("global_step1", 1),), Save("global_step2", 2)),
    "again": Scenario((Save("same", 1),), Save("same", 2)),
    "retention": Scenario((Save("global_step1", 1), Save("global_step2", 2)), Save("global_step3", 3, Kept(last=1))),
}


@functools.cache
def contents(stage: int) -> list[list[Any]]:
    """What each rank writes after each step: [rank][step - 1]."""
    ends = run_job(WORLD, record_jobs, stage, STEPS)
    assert [ended.status for ended in ends] == [0] * WORLD, ends
    return [ended.result for ended in ends]


@functools.cache
def solo_content(stage: int, step: int) -> Any:  # a checkpoint.Job
    """The same state as one rank alone would write it."""
    jobs = [jobs[step - 1] for jobs in contents(stage)]
    whole = Content(
        parts=[part for job in jobs for part in job.content.parts],
        optimizer={name: values for job in jobs for name, values in job.content.optimizer.items()},
        rank_state=jobs[0].content.rank_state,
    )
    return redirected(jobs[0], Path(), content=whole)


def part_of_save(rank: int, stage: int, folder: Path, save: Save, disk: FaultyDisk, links: Links) -> list[Op]:
    """What one rank does in a save; returns the operations that it has begun."""
    saver = Saver(PipeComm(rank, links), disk, threads=0)
    job = contents(stage)[rank][save.step - 1]
    try:
        saver.save(redirected(job, folder, tag=save.tag, kept=save.kept))
        if isinstance(disk, DeadlyDisk):
            disk.at_end()
    finally:
        saver.close()
    return disk.begun


def run_save(stage: int, folder: Path, save: Save, disks: Sequence[FaultyDisk]) -> list[list[Op]]:
    """A save by ranks that are threads of this process; returns the operations that each has begun."""
    contents(stage)  # which forks, and threads should not
    links = make_links(len(disks))
    with ThreadPoolExecutor(len(disks)) as pool:
        rows = [(rank, stage, folder, save, disk, links) for rank, disk in enumerate(disks)]
        return list(pool.map(lambda row: part_of_save(*row), rows))


class Survived(NamedTuple):
    """How a save went for a rank whose fellow died; `error` is None if it was told that all is well."""

    error: Exception | None
    seconds: float


def run_beside_victim(stage: int, folder: Path, save: Save, victim: int, disk: DeadlyDisk) -> Survived:
    """A save by two ranks: one is a process, which dies of its disk; the other is this process."""
    links, survivor = make_links(2), 1 - victim
    contents(stage)

    def body() -> None:
        close_links(links, but=victim)
        part_of_save(victim, stage, folder, save, disk, links)

    job = Job(1, body, prepare=int)
    for end in links[victim].values():
        end.close()
    started, error = time.monotonic(), None
    try:
        part_of_save(survivor, stage, folder, save, FaultyDisk(is_volatile=True), links)
    except Exception as caught:
        error = caught
    seconds = time.monotonic() - started
    close_links(links)
    assert [ended.status for ended in job.end()] == [-signal.SIGKILL], "it was to die"
    return Survived(error, seconds)


def run_to_death(stage: int, folder: Path, save: Save, victim: int, disk: DeadlyDisk) -> None:
    """A save by ranks that die together, when the disk of `victim` says so."""
    contents(stage)

    def body() -> None:
        run_save(stage, folder, save, [disk if rank == victim else FaultyDisk(is_volatile=True) for rank in range(2)])

    assert [ended.status for ended in run_job(1, body)] == [-signal.SIGKILL], "they were to die"


class Rehearsal(NamedTuple):
    """A scenario without a fault."""

    ops: list[list[Op]]  # begun in the last save, by rank
    names: dict[str, str]  # digest of a checkpoint -> "old", "new" or what it is


def rehearse(stage: int, folder: Path, scenario: Scenario) -> Rehearsal:
    """All of it in `folder`/new, and what comes before the last save in `folder`/old."""
    names: dict[str, str] = {}
    old, new = folder / "old", folder / "new"
    old.mkdir()
    for save in scenario.before:
        run_save(stage, old, save, healthy_disks())
        names = {**dict.fromkeys(names, "older"), checkpoint_digest(old / save.tag): "old"}
    shutil.copytree(old, new)
    ops = run_save(stage, new, scenario.last, healthy_disks())
    return Rehearsal(ops, {**names, checkpoint_digest(new / scenario.last.tag): "new"})


def healthy_disks() -> list[FaultyDisk]:
    return [FaultyDisk(is_volatile=True) for _ in range(WORLD)]


def old_state(scenario: Scenario) -> str:
    return "old" if scenario.before else NOTHING


def start_again(stage: int, folder: Path) -> FaultyDisk:
    """What the next job does first: it takes the lock and sweeps."""
    disk = FaultyDisk(is_volatile=True)
    saver = solo_saver(disk)
    saver.lock(folder)
    saver.close()
    return disk


def save_alone(stage: int, folder: Path, save: Save, disk: Disk | None = None) -> str:
    """A save by one rank; returns its digest."""
    saver = solo_saver(disk or FaultyDisk(is_volatile=True))
    saver.save(redirected(solo_content(stage, save.step), folder, tag=save.tag, kept=save.kept))
    saver.close()
    return checkpoint_digest(folder / save.tag)
