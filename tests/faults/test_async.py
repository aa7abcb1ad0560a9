"""Saves behind the training: what is saved is the state at the call, and what goes wrong is heard of soon."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults.disks import DeadlyDisk, FailingDisk, Moment, SlowDisk
from faults.jobs import run_job, tell
from faults.states import (
    BATCHES,
    config,
    engine_digest,
    left_overs,
    logical_state,
    make_engine,
    run_on,
    train,
)
from plain import STAGES, start
from zerolith.checkpoint import Disk, find
from zerolith.errors import CheckpointError

WORLD, STAGE = 2, 3
SOON_S = 10.0
BEHIND = {"async_save": True}


class Normed(nn.Module):
    """A model with buffers, which forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_the_state_at_the_call_whatever_comes_after(stage: int, quick_path: Path) -> None:
    def body() -> None:
        engine = start(config(stage, checkpoint=BEHIND), model=Normed())
        engine._open_saver().lock(quick_path)
        train(engine, BATCHES[:1])
        for tag in ("first", "second"):  # the second one reuses the memory of the first
            engine._open_saver().disk = slow = SlowDisk()
            mine = {"ema": torch.ones(3), "seen": [1]}
            rng, before = torch.get_rng_state(), logical_state(engine)
            engine.save_checkpoint(quick_path, tag=tag, client_state=mine)
            mine["ema"].zero_()
            mine["seen"].append(2)
            train(engine, BATCHES[1:3])
            torch.rand(7)
            assert engine._saver.is_busy, "nothing can have been written"
            slow.go.set()
            engine._saver.flush()
            after = logical_state(engine)
            assert not same(before, after)
            other = start(config(stage), model=Normed())
            home, told = other.load_checkpoint(quick_path)
            assert home == str(quick_path / tag)
            assert torch.equal(told["ema"], torch.ones(3))
            assert told["seen"] == [1]
            assert torch.equal(torch.get_rng_state(), rng)
            assert same(logical_state(other), before)
            other.destroy()

    assert [ended.text for ended in run_job(WORLD, body)] == [""] * WORLD


def train_until_told(engine: Any) -> str:
    """Steps, until one of them raises; returns what it says."""
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        try:
            train(engine, BATCHES[:1])
        except CheckpointError as error:
            return str(error)
    raise AssertionError("the error has never come")


@pytest.mark.parametrize("rank", range(WORLD))
def test_an_error_behind_the_training_is_raised_by_a_later_step_on_all_ranks(rank: int, quick_path: Path) -> None:
    def body() -> list[str]:
        engine = make_engine(STAGE, checkpoint=BEHIND)
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path, tag="good")
        engine._saver.flush()
        texts = []
        for number in (1, 3, 8):
            is_mine = engine.global_rank == rank
            engine._saver.disk = FailingDisk(number, errno.EIO) if is_mine else Disk()
            engine.save_checkpoint(quick_path, tag="bad")
            texts.append(train_until_told(engine))
            assert find(quick_path, None) == ["good"]
            assert left_overs(quick_path) == []
            engine._sharded.comm.max([0.0], name="looked")
            train(engine, BATCHES[:1])  # is told once only
        engine._saver.disk = Disk()
        engine.save_checkpoint(quick_path, tag="next")
        engine._saver.flush()
        assert find(quick_path, None) == ["next"]
        return texts

    for number, ended in enumerate(run_job(WORLD, body)):
        assert ended.status == 0, ended
        for text in ended.result:
            assert f"{quick_path}/bad" in text
            assert "Input/output error" in text
            assert number == rank or f"rank {rank} failed: " in text


ENDS = {
    "next save": lambda engine, folder: engine.save_checkpoint(folder, tag="next"),
    "load": lambda engine, folder: engine.load_checkpoint(folder),
}


@pytest.mark.parametrize("name", ENDS)
def test_if_no_step_comes_the_next_save_or_load_tells_of_the_error(name: str, quick_path: Path) -> None:
    def body() -> None:
        engine = make_engine(STAGE, checkpoint=BEHIND)
        run_on(engine, to=1)
        engine._open_saver().disk = FailingDisk(4)
        engine.save_checkpoint(quick_path, tag="bad")
        with pytest.raises(CheckpointError, match="/bad"):
            ENDS[name](engine, quick_path)
        assert find(quick_path, None) == []

    assert [ended.text for ended in run_job(WORLD, body)] == [""] * WORLD


@pytest.mark.parametrize("ends", ["destroyed", "exits"])
def test_an_error_of_the_last_save_is_logged_at_the_latest_when_the_engine_goes(ends: str, quick_path: Path) -> None:
    def body() -> None:
        class Tell(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                tell((record.levelname, record.getMessage()))

        logging.getLogger("zerolith").addHandler(Tell(logging.WARNING))
        engine = make_engine(STAGE, checkpoint=BEHIND)
        run_on(engine, to=1)
        engine._open_saver().disk = FailingDisk(4)
        engine.save_checkpoint(quick_path, tag="bad")
        if ends == "destroyed":
            engine.destroy()

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert any(level == "ERROR" and "/bad" in text and "\n" not in text for level, text in ended.told), ended.told


@pytest.mark.parametrize("victim", range(WORLD))
def test_if_a_rank_dies_as_it_writes_the_others_end_soon_and_latest_stays(victim: int, quick_path: Path) -> None:
    def body() -> None:
        engine = make_engine(STAGE, checkpoint=BEHIND)
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path, tag="good")
        engine._saver.flush()
        if engine.global_rank == victim:
            engine._saver.disk = DeadlyDisk(Moment(5))
        engine.save_checkpoint(quick_path, tag="bad")
        tell("saving")
        while True:
            train(engine, BATCHES[:1])

    ends = run_job(WORLD, body)
    assert ends[victim].status == -9
    assert ends[1 - victim].status == 1
    assert ends[1 - victim].kind == "PeerLostError"
    assert ends[1 - victim].seconds < SOON_S
    assert find(quick_path, None) == ["good"]


def test_a_process_that_ends_finishes_its_save_first(quick_path: Path) -> None:
    def body() -> str:
        engine = make_engine(STAGE, checkpoint=BEHIND)
        run_on(engine, to=1)
        engine._open_saver().disk = slow = SlowDisk(limit_s=0.02)
        engine.save_checkpoint(quick_path)
        assert len(slow.trace) < 5
        return engine_digest(engine)

    def resumed() -> str:
        engine = make_engine(STAGE)
        engine.load_checkpoint(quick_path)
        return engine_digest(engine)

    ends = run_job(WORLD, body)
    assert [ended.status for ended in ends] == [0] * WORLD, ends
    assert [ended.result for ended in run_job(WORLD, resumed)] == [ended.result for ended in ends]
