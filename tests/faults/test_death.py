"""A rank killed in any phase of a step or of a save: the others end soon, and the next job goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.disks import die
from faults.jobs import Ended, run_job
from faults.states import engine_digest, make_engine, run_on
from zerolith.checkpoint import find
from zerolith.comm import Comm

WORLD = 2
LAST = 4  # step of the oracle
SOON_S = 10.0


def in_forward(engine: Any) -> None:
    engine.module.register_forward_pre_hook(lambda *_: die())


def in_backward(engine: Any) -> None:
    def watch(module: Any, args: Any, output: Any) -> None:
        output.register_hook(lambda grad: die())

    engine.module.register_forward_hook(watch)


def instead_of(owner: Any, name: str) -> None:
    setattr(owner, name, lambda *args, **kwargs: die())


def in_reduce(engine: Any) -> None:
    instead_of(engine._sharded.comm, "reduce_scatter")


def in_gather(engine: Any) -> None:
    instead_of(engine._sharded.comm, "all_gather")


def in_step(engine: Any) -> None:
    engine.basic_optimizer.register_step_pre_hook(lambda *_: die())


def after_step(engine: Any) -> None:
    engine.basic_optimizer.register_step_post_hook(lambda *_: die())


PHASES: dict[str, Callable[[Any], None]] = {
    "forward": in_forward,
    "backward": in_backward,
    "reduce": in_reduce,
    "gather": in_gather,
    "step": in_step,
    "after step": after_step,
}
CASES = [(stage, phase, victim) for stage in (1, 3) for phase in PHASES for victim in range(WORLD)]


def uninterrupted(stage: int, world: int) -> str:
    """The state after the last step."""

    def body() -> str:
        engine = make_engine(stage)
        run_on(engine, to=LAST)
        return engine_digest(engine)

    return str(run_job(world, body)[0].result)


_ORACLES: dict[tuple[int, int], str] = {}


def oracle(stage: int, world: int = WORLD) -> str:
    if (stage, world) not in _ORACLES:
        _ORACLES[stage, world] = uninterrupted(stage, world)
    return _ORACLES[stage, world]


def resume(stage: int, folder: Path) -> list[Ended]:
    """A fresh job that goes on to the last step; it results in its first step and its last state."""

    def body() -> tuple[int, str]:
        engine = make_engine(stage, checkpoint={"folder": str(folder)})
        engine.load_checkpoint()
        first = int(engine.global_steps)
        run_on(engine, to=LAST)
        return first, engine_digest(engine)

    return run_job(WORLD, body)


def check_end(ends: list[Ended], victim: int) -> None:
    """The victim was killed; the others were told of it, soon, and ended by themselves."""
    for rank, ended in enumerate(ends):
        if rank == victim:
            assert ended.status == -9
        else:
            assert ended.status == 1
            assert ended.kind == "PeerLostError", ended
            assert "another rank died" in ended.text
            assert "\n" not in ended.text
            assert ended.seconds < SOON_S


@pytest.mark.parametrize(("stage", "phase", "victim"), CASES)
def test_a_rank_killed_in_a_step(stage: int, phase: str, victim: int, quick_path: Path) -> None:
    def body() -> None:
        engine = make_engine(stage, checkpoint={"folder": str(quick_path)})
        run_on(engine, to=2)
        engine.save_checkpoint()
        run_on(engine, to=3)
        if engine.global_rank == victim:
            PHASES[phase](engine)
        run_on(engine, to=LAST + 1)

    check_end(run_job(WORLD, body, limit_s=SOON_S), victim)
    for ended in resume(stage, quick_path):
        assert ended.result == (2, oracle(stage)), ended


class Watched:
    """A Comm that calls `before` ahead of each collective."""

    def __init__(self, comm: Comm, before: Callable[[], object]) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.comm = comm
        self.before = before

    def max(self, *args: Any, **kwargs: Any) -> list[float]:
        self.before()
        return self.comm.max(*args, **kwargs)

    def all_gather_bytes(self, *args: Any, **kwargs: Any) -> list[bytes]:
        self.before()
        return self.comm.all_gather_bytes(*args, **kwargs)


def save_with_death(folder: Path, number: int) -> int:
    """In a rank: a save in which rank 1 dies before this collective; returns how many there are if it does not."""
    engine = make_engine(3)
    run_on(engine, to=1)
    engine.save_checkpoint(folder)
    run_on(engine, to=2)
    calls: list[None] = []

    def before() -> None:
        if len(calls) == number and engine.global_rank == 1:
            die()
        calls.append(None)

    engine._saver.comm = Watched(engine._saver.comm, before)
    engine.save_checkpoint(folder)
    return len(calls)


def test_a_rank_killed_before_any_collective_of_a_save(quick_path: Path) -> None:
    count, same_count = (ended.result for ended in run_job(WORLD, save_with_death, quick_path / "rehearsal", -1))
    assert count == same_count >= 5
    for number in range(count):
        folder = quick_path / str(number)
        check_end(run_job(WORLD, save_with_death, folder, number), victim=1)
        assert find(folder, None) in (["global_step1"], ["global_step2"])
        assert resume(3, folder)[0].result[1] == oracle(3)


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_rank_that_is_not_there_at_the_first_save(victim: int, quick_path: Path) -> None:
    """The first save makes a group of its own for the ranks."""

    def body() -> None:
        engine = make_engine(3)
        run_on(engine, to=1)
        if engine.global_rank == victim:
            die()
        engine.save_checkpoint(quick_path)

    check_end(run_job(WORLD, body, limit_s=SOON_S), victim)
