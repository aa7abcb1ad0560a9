"""Several jobs and one folder: one writes, the others are told who does; and folders where nobody may write."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from faults.jobs import Job, living, run_job, tell
from faults.states import engine_digest, left_overs, make_engine, run_on
from zerolith.checkpoint import find
from zerolith.errors import CheckpointError

WORLD, STAGE = 2, 3
NOBODY = 65534


def hold(folder: Path) -> None:
    """In a rank: save once to the folder, and keep it."""
    engine = make_engine(STAGE, checkpoint={"folder": str(folder)})
    run_on(engine, to=1)
    engine.save_checkpoint()
    tell("saved")
    time.sleep(60)


def save_next(folder: Path) -> int:
    """In a rank: go on from the newest checkpoint, and save the next; returns its step."""
    engine = make_engine(STAGE, checkpoint={"folder": str(folder)})
    engine.load_checkpoint()
    run_on(engine, to=engine.global_steps + 1)
    engine.save_checkpoint()
    return int(engine.global_steps)


def holding_job(folder: Path) -> Job:
    job = Job(WORLD, hold, folder)
    assert [job.told(rank) for rank in range(WORLD)] == ["saved"] * WORLD
    return job


def kill(job: Job) -> None:
    for rank in range(WORLD):
        job.signal(rank, signal.SIGKILL)
    assert [ended.status for ended in job.end()] == [-signal.SIGKILL] * WORLD


def test_a_second_job_is_refused_at_its_start_until_the_first_is_gone(quick_path: Path) -> None:
    first = holding_job(quick_path)
    before = {path: path.stat().st_mtime_ns for path in quick_path.rglob("*")}
    for rank, ended in enumerate(run_job(WORLD, save_next, quick_path)):
        assert ended.status == 1
        assert ended.kind == ("CheckpointLockedError" if rank == 0 else "CheckpointError")
        assert f"{quick_path}: another job writes checkpoints here" in ended.text
        assert f"process {first.pids[0]} on {socket.gethostname()}, since " in ended.text
        assert "\n" not in ended.text
    assert {path: path.stat().st_mtime_ns for path in quick_path.rglob("*")} == before
    kill(first)
    assert [ended.result for ended in run_job(WORLD, save_next, quick_path)] == [2] * WORLD
    assert left_overs(quick_path) == []


def test_a_job_that_meets_a_lock_at_a_save_goes_on_training(quick_path: Path) -> None:
    def body() -> int:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        with pytest.raises(CheckpointError, match=f"process {first.pids[0]} on "):
            engine.save_checkpoint(quick_path / "first")
        run_on(engine, to=2)
        engine.save_checkpoint(quick_path / "second")
        return int(engine.global_steps)

    first = holding_job(quick_path / "first")
    assert [ended.result for ended in run_job(WORLD, body)] == [2] * WORLD
    kill(first)


def test_reading_needs_no_lock(quick_path: Path) -> None:
    def body() -> int:
        engine = make_engine(STAGE)
        engine.load_checkpoint(quick_path)
        return int(engine.global_steps)

    first = holding_job(quick_path)
    assert [ended.result for ended in run_job(WORLD, body)] == [1] * WORLD
    kill(first)


def test_a_child_of_a_dead_rank_does_not_hold_its_lock(quick_path: Path) -> None:
    """Workers that fetch data outlive the rank that has forked them by some seconds."""

    def body() -> None:
        engine = make_engine(STAGE, checkpoint={"folder": str(quick_path)})
        run_on(engine, to=1)
        engine.save_checkpoint()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        tell(child)
        time.sleep(60)

    first = Job(1, body)
    child = first.told(0)
    first.signal(0, signal.SIGKILL)
    try:
        assert [ended.result for ended in run_job(1, save_next, quick_path)] == [2]
    finally:
        os.kill(child, signal.SIGKILL)
        while child in living(first.pids[0]):  # it is not dead at once
            time.sleep(0.01)
        first.end()


def is_free(folder: Path) -> bool:
    """Whether another job could write there: the lock of a file that is opened anew is a stranger's."""
    file = os.open(folder / ".zerolith.lock", os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def in_one_process(folder: Path, ends: str) -> None:
    """In a rank: two engines save to one folder, and let go of it one after the other."""
    engines = [make_engine(stage) for stage in (1, 3)]
    for number, engine in enumerate(engines):
        run_on(engine, to=number + 1)
        engine.save_checkpoint(folder)
    for number, engine in enumerate(engines):
        digest = engine_digest(engine)
        engine.load_checkpoint(folder, tag=f"global_step{number + 1}")
        assert engine_digest(engine) == digest
    assert find(folder, None) == ["global_step2"]
    for _ in range(2):
        assert not is_free(folder)
        engine = engines.pop()
        if ends == "destroyed":
            engine.destroy()
        del engine
        gc.collect()
    assert is_free(folder)


@pytest.mark.parametrize("ends", ["destroyed", "dropped"])
def test_engines_of_one_process_share_a_folder_and_give_it_back(ends: str, quick_path: Path) -> None:
    (ended,) = run_job(1, in_one_process, quick_path, ends)
    assert ended.status == 0, ended


# --- folders without permission ---------------------------------------------------------------------


def become_nobody() -> None:
    """Root may write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def start_as_nobody(folder: Path) -> Any:
    """An engine with this folder in its config, of a user who is not root. The first one imports all that is needed."""
    warm = make_engine(STAGE)
    run_on(warm, to=1)
    warm.destroy()
    become_nobody()
    return make_engine(STAGE, checkpoint={"folder": str(folder)})


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(is_there: bool, quick_path: Path) -> None:
    closed = quick_path / "closed"
    closed.mkdir()
    folder = closed if is_there else closed / "runs" / "checkpoints"
    closed.chmod(0o555)
    quick_path.chmod(0o755)

    def body() -> None:
        start_as_nobody(folder)

    for ended in run_job(WORLD, body):
        assert ended.status == 1
        assert ended.kind == "CheckpointError"
        assert f"{folder}: checkpoints cannot be written here (Permission denied)" in ended.text
        assert "\n" not in ended.text
    assert not list(closed.iterdir())


def test_a_folder_that_is_closed_after_three_saves_gives_a_clean_error(quick_path: Path) -> None:
    quick_path.chmod(0o777)
    folder = quick_path / "runs"

    def body() -> tuple[str, str, str]:
        engine = start_as_nobody(folder)
        for step in range(1, 4):
            run_on(engine, to=step)
            engine.save_checkpoint()
        run_on(engine, to=4)
        before = engine_digest(engine)
        if engine.global_rank == 0:
            folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        engine._sharded.comm.max([0.0], name="closed")
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint()
        assert find(folder, None) == ["global_step3"]
        engine._sharded.comm.max([0.0], name="looked")
        if engine.global_rank == 0:
            folder.chmod(stat.S_IRWXU)
        engine._sharded.comm.max([0.0], name="opened")
        after = engine_digest(engine)
        engine.save_checkpoint()
        return str(caught.value), before, after

    for rank, ended in enumerate(run_job(WORLD, body)):
        assert ended.status == 0, ended
        text, before, after = ended.result
        assert f"{folder}/global_step4: Permission denied" in text
        assert rank == 0 or "rank 0 failed: " in text
        assert before == after
    assert find(folder, None) == ["global_step4"]
    assert left_overs(folder) == []


def test_what_a_start_that_was_killed_has_left_does_not_stop_the_next(quick_path: Path) -> None:
    """Process numbers come again; in a container they are often the same every time."""

    def body() -> None:
        for name in (f".zerolith.probe-{os.getpid()}", f".zerolith.probe-{os.getpid()}.new"):
            (quick_path / name).touch()
        make_engine(STAGE, checkpoint={"folder": str(quick_path)})

    assert [ended.text for ended in run_job(WORLD, body)] == ["", ""]
    assert left_overs(quick_path) == []
