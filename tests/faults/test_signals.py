"""SIGTERM: the step is finished and saved, and all ranks end with status 0; what is in the way ends in time, too."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.disks import FailingDisk, FaultyDisk, Op, SlowDisk
from faults.jobs import Ended, Job, run_job, tell
from faults.states import BATCHES, NOTHING, engine_digest, left_overs, make_engine, run_on, train
from zerolith.checkpoint import find

WORLD, STAGE = 2, 3
SIGNALLED = 2  # steps that are done when the signal comes
SOON_S = 10.0
TWICE, TOO_LATE = 128 + signal.SIGTERM, 124


def make_preempted(folder: Path, *, deadline_s: int = 60, **settings: Any) -> Any:
    preemption = {"enabled": True, "deadline_s": deadline_s}
    return make_engine(STAGE, checkpoint={"folder": str(folder), "preemption": preemption, **settings})


SENT: list[int] = []  # by this process


def send_sigterm(*_: Any) -> None:
    """The first time only, for hooks are called in every micro-batch."""
    if not SENT:
        SENT.append(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


class SignallingDisk(FaultyDisk):
    """Sends the signal to its own process at an operation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def before(self, number: int, op: Op) -> None:
        if number == self.number:
            send_sigterm()


def in_forward(engine: Any) -> None:
    engine.module.register_forward_pre_hook(send_sigterm)


def in_backward(engine: Any) -> None:
    def watch(module: Any, args: Any, output: Any) -> None:
        output.register_hook(send_sigterm)

    engine.module.register_forward_hook(watch)


def in_step(engine: Any) -> None:
    engine.basic_optimizer.register_step_pre_hook(send_sigterm)


def in_save(engine: Any) -> None:
    engine._saver.disk = SignallingDisk(1)
    engine.save_checkpoint(tag="asked")


MOMENTS: dict[str, Callable[[Any], None]] = {
    "before a step": send_sigterm,
    "forward": in_forward,
    "backward": in_backward,
    "step": in_step,
    "save": in_save,
}


CASES = [(moment, False, ranks) for moment in MOMENTS for ranks in [(0,), (1,), (0, 1)]]
CASES += [("forward", True, (1,)), ("save", True, (1,)), ("save", True, (0, 1))]


def check_resumed(folder: Path, step: int) -> None:
    """The newest checkpoint is of this step, and equal to a run that was never interrupted; the next job starts."""

    def body() -> tuple[str, str]:
        engine = make_engine(STAGE, checkpoint={"folder": str(folder)})
        engine.load_checkpoint()
        loaded = engine_digest(engine)
        assert engine.global_steps == step
        engine.destroy()
        oracle = make_engine(STAGE)
        run_on(oracle, to=step)
        return loaded, engine_digest(oracle)

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        loaded, expected = ended.result
        assert loaded == expected
    assert left_overs(folder) == []


@pytest.mark.parametrize(("moment", "behind", "ranks"), CASES)
def test_the_step_at_hand_is_saved_and_all_ranks_end(
    moment: str, behind: bool, ranks: tuple[int, ...], quick_path: Path
) -> None:
    def body() -> None:
        engine = make_preempted(quick_path, async_save=behind)
        run_on(engine, to=SIGNALLED)
        if moment == "save":  # collective
            if engine.global_rank not in ranks:
                engine.save_checkpoint(tag="asked")
            else:
                in_save(engine)
        elif engine.global_rank in ranks:
            MOMENTS[moment](engine)
        run_on(engine, to=SIGNALLED + 2)

    for ended in run_job(WORLD, body, limit_s=SOON_S):
        assert (ended.status, ended.kind, ended.text) == (0, "SystemExit", "0"), ended
    assert find(quick_path, None) == [f"global_step{SIGNALLED + 1}"]
    check_resumed(quick_path, SIGNALLED + 1)


def save_slowly(folder: Path, deadline_s: int) -> None:
    """In a rank: step 2 is saved by the signal, on a disk that never gets done."""

    class Telling(SlowDisk):
        def before(self, number: int, op: Op) -> None:
            if number == 3:
                tell("saving")
            if number >= 3:
                super().before(number, op)

    logging.getLogger("zerolith").addHandler(TellErrors(logging.ERROR))
    engine = make_preempted(folder, deadline_s=deadline_s)
    run_on(engine, to=1)
    engine.save_checkpoint()
    engine._saver.disk = Telling(limit_s=60)
    tell("ready")
    while True:
        train(engine, BATCHES[:1])


class TellErrors(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())


def signalled_job(folder: Path, deadline_s: int) -> Job:
    """A job whose ranks have had one signal each, and are in the save that it asks for."""
    job = Job(WORLD, save_slowly, folder, deadline_s)
    for rank in range(WORLD):
        assert job.told(rank) == "ready"
    for rank in range(WORLD):
        job.signal(rank, signal.SIGTERM)
    for rank in range(WORLD):
        assert job.told(rank) == "saving"
    return job


def test_a_second_signal_ends_the_process_at_once(quick_path: Path) -> None:
    job = signalled_job(quick_path, 60)
    for rank in range(WORLD):
        job.signal(rank, signal.SIGTERM)
    for ended in job.end(limit_s=SOON_S / 2):
        assert ended.status == TWICE
    check_resumed(quick_path, 1)


def test_if_the_deadline_passes_the_process_ends_with_124(quick_path: Path) -> None:
    job = signalled_job(quick_path, 1)
    for ended in job.end(limit_s=SOON_S / 2):
        assert ended.status == TOO_LATE
        assert ended.told == ["no checkpoint was committed within 1 s after SIGTERM; the process ends"]
    check_resumed(quick_path, 1)


def wait_for_others(folder: Path, deadline_s: int) -> None:
    """In a rank: rank 0 waits in a collective for rank 1, which is asleep."""
    engine = make_preempted(folder, deadline_s=deadline_s)
    run_on(engine, to=1)
    engine.save_checkpoint()
    tell("ready")
    if engine.global_rank == 1:
        time.sleep(60)
    train(engine, BATCHES[:1])


@pytest.mark.parametrize(("num_signals", "status"), [(1, TOO_LATE), (2, TWICE)])
def test_a_process_that_waits_for_a_rank_that_hangs_ends_in_time_too(
    num_signals: int, status: int, quick_path: Path
) -> None:
    job = Job(WORLD, wait_for_others, quick_path, 1 if num_signals == 1 else 60)
    for rank in range(WORLD):
        assert job.told(rank) == "ready"
    time.sleep(0.3)  # rank 0 is in the collective by then, or will be with a signal
    for _ in range(num_signals):
        job.signal(0, signal.SIGTERM)
        time.sleep(0.1)
    deadline = time.monotonic() + SOON_S / 2
    while is_running(job.pids[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    was_running = is_running(job.pids[0])
    job.signal(1, signal.SIGKILL)
    first, _ = job.end()
    assert not was_running, "rank 0 does not hear of the signal before rank 1 moves"
    assert first.status == status
    check_resumed(quick_path, 1)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_save_behind_the_training_that_fails_does_not_keep_the_last_one_from_being_made(quick_path: Path) -> None:
    def body() -> None:
        engine = make_preempted(quick_path, async_save=True)
        run_on(engine, to=1)
        saver = engine._saver
        saver.disk = FailingDisk(4)
        engine.save_checkpoint(tag="bad")
        saver._thread.join()  # so that both are there at the next step
        send_sigterm()
        run_on(engine, to=2)

    ends: list[Ended] = run_job(WORLD, body, limit_s=SOON_S)
    assert find(quick_path, None) != NOTHING
    assert [ended.status for ended in ends] == [0, 0], ends
    check_resumed(quick_path, 2)


def test_a_child_of_the_process_ends_by_the_signal_as_ever(quick_path: Path) -> None:
    """Workers are told to end by SIGTERM; they have no step to finish, and their rank is not meant."""

    def body() -> tuple[int, bool]:
        engine = make_preempted(quick_path)
        run_on(engine, to=1)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + SOON_S / 2
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        run_on(engine, to=2)
        return status, bool(engine._preemption.requested)

    for ended in run_job(WORLD, body):
        assert ended.result == (-signal.SIGTERM, False), ended
