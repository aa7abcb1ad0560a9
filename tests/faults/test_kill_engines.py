"""kill -9 in saves of engines that train: the next job, on one rank or on two, has the old state or the new one."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.disks import DeadlyDisk, FaultyDisk, Moment, Op
from faults.jobs import run_job
from faults.states import engine_digest, left_overs, make_engine, run_on

WORLD, STAGE = 2, 3
LAST = 4
SOON_S = 10.0
CASES = [(victim, part) for victim in ("rank 0", "all") for part in range(3)] + [("rank 1", 0)]


def save_twice(folder: Path, at: int, moment: Moment | None, takes_all: bool) -> list[Op]:
    """In a rank: save steps 1 and 2; rank `at`, or all, die in the second save. Returns the operations begun."""
    engine = make_engine(STAGE)
    run_on(engine, to=1)
    engine.save_checkpoint(folder)
    run_on(engine, to=2)
    is_deadly = moment is not None and engine.global_rank == at
    disk = DeadlyDisk(moment, takes_all=takes_all) if is_deadly else FaultyDisk(is_volatile=True)
    engine._saver.disk = disk
    engine.save_checkpoint(folder)
    if isinstance(disk, DeadlyDisk):
        disk.at_end()
    return disk.begun


@functools.cache
def oracle() -> dict[int, str]:
    """The state after each step of a run that nobody interrupts."""

    def body() -> dict[int, str]:
        engine, digests = make_engine(STAGE), {}
        for step in range(1, LAST + 1):
            run_on(engine, to=step)
            digests[step] = engine_digest(engine)
        return digests

    return dict(run_job(WORLD, body)[0].result)


def resume_all(folders: list[Path], *, goes_on: bool) -> list[tuple[int, str, str]]:
    """In a rank: what each of these folders gives: its step, its state and, if the training goes on, the last one."""
    engine, found = make_engine(STAGE), []
    for folder in folders:
        engine.load_checkpoint(folder)
        first, digest = int(engine.global_steps), engine_digest(engine)
        run_on(engine, to=LAST if goes_on else first)
        found.append((first, digest, engine_digest(engine)))
    return found


def points_of(ops: list[Op]) -> list[Moment]:
    """Before each operation, but for writes that neither begin nor end a file, and after the last."""
    kinds = ["", *(op.kind for op in ops), ""]
    inner = [all(kind == "write" for kind in kinds[at : at + 3]) for at in range(len(ops))]
    return [Moment(number) for number in range(len(ops)) if not inner[number]] + [Moment(len(ops))]


@pytest.mark.parametrize(("victim", "part"), CASES)
def test_whenever_ranks_are_killed_the_next_job_has_the_old_state_or_the_new(
    victim: str, part: int, quick_path: Path
) -> None:
    at, takes_all = 1 if victim == "rank 1" else 0, victim == "all"
    rehearsal = run_job(WORLD, save_twice, quick_path / "rehearsal", at, None, False)
    points = points_of(rehearsal[at].result)
    assert len(points) >= (5 if at else 18), "fewer moments than before"
    mine = points if at else points[part::3]
    folders, reported = [], []
    for moment in mine:
        folder = quick_path / str(moment.number)
        ends = run_job(WORLD, save_twice, folder, at, moment, takes_all, limit_s=SOON_S)
        assert ends[at].status == -signal.SIGKILL
        other = ends[1 - at]
        is_last = moment == points[-1]
        if takes_all:
            assert other.status == -signal.SIGKILL or (is_last and other.status == 0)
        else:
            assert other.status == 0 or other.kind == "PeerLostError", other
        folders.append(folder)
        reported.append(is_last or other.status == 0)
    alone = run_job(1, functools.partial(resume_all, folders, goes_on=False))[0].result
    together = run_job(WORLD, functools.partial(resume_all, folders, goes_on=True))[0].result
    check_resumed(alone, together, reported)
    assert all(left_overs(folder) == [] for folder in folders if is_swept(folder))


def check_resumed(alone: list[Any], together: list[Any], reported: list[bool]) -> None:
    for (step, digest, _), (same_step, same_digest, last), was_reported in zip(alone, together, reported, strict=True):
        assert step == same_step
        assert step in (1, 2)
        assert step == 2 or not was_reported
        assert digest == same_digest == oracle()[step]
        assert last == oracle()[LAST]
    steps = [step for step, *_ in together]
    assert steps == sorted(steps), "the new one came and went"


def is_swept(folder: Path) -> bool:
    """Another job's save sweeps it first."""
    ends = run_job(1, save_over, folder)
    return ends[0].status == 0


def save_over(folder: Path) -> None:
    engine = make_engine(STAGE)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(folder)
