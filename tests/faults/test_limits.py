"""Too few descriptors, too little memory: named on all ranks in bounded time, and gone as soon as there is enough."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerolith.checkpoint.blocks
import zerolith.comm.start
from faults.jobs import run_job
from faults.states import BATCHES, config, engine_digest, left_overs, make_engine, run_on, train
from plain import start
from zerolith.checkpoint import find
from zerolith.errors import CheckpointError

WORLD, STAGE = 2, 3
SOON_S = 15.0


@pytest.fixture(autouse=True)
def _blocks_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zerolith.checkpoint.blocks, "WRITE_BYTES", 1 << 22)


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    _, hard = before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def descriptors(num_free: int) -> Any:
    """A context in which so many more files can be opened."""
    used = {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}
    limit = 0
    while limit - len({each for each in used if each < limit}) < num_free:
        limit += 1
    return limited(resource.RLIMIT_NOFILE, limit)


def memory(num_free: int) -> Any:
    """A context in which so many more bytes can be mapped."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limited(resource.RLIMIT_AS, size + num_free)


def outcome(engine: Any, call: Callable[[], object]) -> tuple[str, str]:
    """What a collective call raises: its type and text, both empty if it works. The same on all ranks, or it fails."""
    kind, text = "", ""
    try:
        call()
    except CheckpointError as error:
        kind, text = "CheckpointError", str(error)
    kinds = engine._sharded.comm.all_gather_bytes(kind.encode(), name="kinds of errors")
    assert set(kinds) in ({b""}, {b"CheckpointError"}), f"ranks have gone different ways: {kinds} {text}"
    return kind, text


@pytest.mark.parametrize("rank", range(WORLD))
def test_too_few_descriptors_fail_a_save_and_a_load_on_all_ranks(rank: int, quick_path: Path) -> None:
    def body() -> list[tuple[str, str]]:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path)
        found = []
        for num_free in (0, 1, 2, 8):
            for what in ("save", "load"):
                run_on(engine, to=2)
                before, newest = engine_digest(engine), find(quick_path, None)
                call = engine.save_checkpoint if what == "save" else engine.load_checkpoint
                tag = "global_step2" if what == "save" else "global_step1"
                with descriptors(num_free if engine.global_rank == rank else 100):
                    kind, text = outcome(engine, partial(call, quick_path, tag=tag))
                found.append((f"{what} {num_free}", text))
                if kind:
                    assert engine_digest(engine) == before
                    assert find(quick_path, None) == newest
                    assert left_overs(quick_path) == []
                    engine._sharded.comm.max([0.0], name="looked")
        run_on(engine, to=3)
        engine.save_checkpoint(quick_path)
        assert find(quick_path, None) == ["global_step3"]
        return found

    for number, ended in enumerate(run_job(WORLD, body)):
        assert ended.status == 0, ended
        found = dict(ended.result)
        for what in ("save 0", "load 0", "load 1"):
            assert "Too many open files" in found[what], found
            assert str(quick_path) in found[what]
            assert number == rank or f"rank {rank} failed: " in found[what]
        assert found["save 8"] == found["load 8"] == ""


def test_too_few_descriptors_at_the_first_save_of_all_end_in_bounded_time(quick_path: Path) -> None:
    def body() -> None:
        zerolith.comm.start.JOINING = timedelta(seconds=2)
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        with descriptors(0 if engine.global_rank == 1 else 100):
            engine.save_checkpoint(quick_path)

    for ended in run_job(WORLD, body, limit_s=SOON_S):
        assert ended.status == 1
        assert ended.kind in ("CheckpointError", "PeerLostError"), ended


class Large(nn.Module):
    """A model whose states need more memory than an allocator keeps by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(4_000_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.table[:3]


CALLS: dict[str, tuple[bool, Callable[[Any, Path], object]]] = {  # whether saves are behind, and what is called
    "save": (False, lambda engine, folder: engine.save_checkpoint(folder, tag="scarce")),
    "save behind": (True, lambda engine, folder: engine.save_checkpoint(folder, tag="scarce")),
    "load": (False, lambda engine, folder: engine.load_checkpoint(folder, tag="good")),
}


# With much less, Python itself may wait for ever for a thread that could not start.
SHORTAGE = ("memory", "thread", "bad_alloc")  # what Python, torch and C++ say
SCARCE = [1 << 22, 1 << 23]


@pytest.mark.parametrize("num_free", SCARCE)
@pytest.mark.parametrize("what", CALLS)
def test_too_little_memory_on_one_rank_ends_in_bounded_time(what: str, num_free: int, quick_path: Path) -> None:
    behind, call = CALLS[what]

    def body() -> str:
        engine = start(config(STAGE, checkpoint={"async_save": behind}), model=Large())
        train(engine, BATCHES[:1])
        saver = engine._open_saver()
        with memory(num_free if engine.global_rank == 1 else 1 << 32):
            kind, text = outcome(engine, lambda: (call(engine, quick_path), saver.flush()))
        if kind and what == "load":
            engine.load_checkpoint(quick_path, tag="good")
        train(engine, BATCHES[1:2])
        engine.save_checkpoint(quick_path, tag="next")
        saver.flush()
        return text

    assert run_job(1, save_good, quick_path)[0].status == 0
    ends = run_job(WORLD, body, limit_s=SOON_S)
    if ends[0].status == 0:  # an error that all have heard of, or none
        assert ends[1].status == 0, ends
        if what == "save behind":
            assert "no copy of the checkpoint could be made" in ends[1].result
            assert "rank 1 failed: " in ends[0].result
    else:
        assert {ended.status for ended in ends} == {1}
        assert ends[0].kind == "PeerLostError", ends
        assert ends[1].kind == "MemoryError" or any(word in ends[1].text for word in SHORTAGE), ends
    assert run_job(1, next_start, quick_path)[0].status == 0
    assert left_overs(quick_path) == []


def save_good(folder: Path) -> None:
    engine = start(config(STAGE), model=Large())
    train(engine, BATCHES[:1])
    engine.save_checkpoint(folder, tag="good")


def next_start(folder: Path) -> None:
    """In a rank: what the next job does, which needs nobody to clean up."""
    engine = start(config(STAGE, checkpoint={"folder": str(folder)}), model=Large())
    assert engine.load_checkpoint()[0] is not None
    engine.save_checkpoint(tag="after")
