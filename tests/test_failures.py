"""Ranks that go different ways, or go away, end all others in bounded time with a readable error."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zerolith
from harness import run_ranks, run_ranks_raw
from plain import (
    MICRO,
    STAGES,
    assert_close,
    config_for,
    make_batches,
    make_mlp,
    my_micro_batches,
    start,
    step_each,
    train_engine,
    train_plain,
)
from zerolith.comm import Comm
from zerolith.errors import CollectiveMismatchError, DistributedError, PeerLostError

LIMIT_S = 60.0  # in which ranks must be done: far more than a failure takes, a tenth of a collective's timeout


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


# --- different collectives --------------------------------------------------------------------------


def gather(comm: Comm, name: str, dtype: torch.dtype = torch.float32) -> None:
    comm.all_gather(torch.zeros(8, dtype=dtype), name=name).wait()


def swapped(comm: Comm) -> None:
    for name in ("one", "other") if comm.rank == 0 else ("other", "one"):
        gather(comm, name)


def another_dtype(comm: Comm) -> None:
    gather(comm, "same", torch.float32 if comm.rank == 0 else torch.int32)


def another_operation(comm: Comm) -> None:
    tensor = torch.zeros(4)
    if comm.rank == 0:
        comm.broadcast(tensor, source=0, name="same")
        comm.broadcast(tensor, source=1, name="same")
    else:
        comm.all_gather(torch.zeros(8), name="same").wait()


MISMATCHES: list[tuple[Callable[[Comm], None], list[str]]] = [
    (swapped, ["rank 0: ", "all_gather of one: 8 x float32", "rank 1: ", "all_gather of other: 8 x float32"]),
    (another_dtype, ["all_gather of same: 8 x float32", "all_gather of same: 8 x int32"]),
    (another_operation, ["broadcast from 0 of same: 4 x float32", "all_gather of same: 8 x float32"]),
]


@pytest.mark.parametrize(("issue", "words"), MISMATCHES, ids=[row[0].__name__ for row in MISMATCHES])
def test_different_collectives_are_found_at_the_next_step_on_all_ranks(
    issue: Callable[[Comm], None], words: list[str]
) -> None:
    batches = make_batches(2, 2 * MICRO)

    def body() -> list[str]:
        texts = []
        for stage in STAGES:
            engine = start(config_for(stage), make_optimizer=sgd)
            step_each(engine, engine.optimizer, list(my_micro_batches(batches[0])))
            issue(engine._sharded.comm)
            with pytest.raises(CollectiveMismatchError) as caught:
                step_each(engine, engine.optimizer, list(my_micro_batches(batches[1])))
            texts.append(str(caught.value))
            engine.destroy()
        return texts

    for texts in run_ranks(2, body):
        for text in texts:
            for word in words:
                assert word in text
            assert "\n" not in text


def test_fingerprints_are_compared_as_often_as_the_config_says() -> None:
    batches = make_batches(4, 2 * MICRO)

    def body() -> list[bool]:
        engine = start(config_for(1, fingerprint_interval=3), make_optimizer=sgd)
        swapped(engine._sharded.comm)
        found = []
        for batch in batches:
            try:
                step_each(engine, engine.optimizer, list(my_micro_batches(batch)))
                found.append(False)
            except CollectiveMismatchError:
                found.append(True)
                engine.reset()
        return found

    def off() -> None:
        engine = start(config_for(1, fingerprint_interval=0), make_optimizer=sgd)
        swapped(engine._sharded.comm)
        assert_close(train_engine(engine, batches), train_plain(make_mlp(), batches, sgd))

    for found in run_ranks(2, body):
        assert found[0] is True  # step 0 is a multiple of 3
    run_ranks(2, off)


# --- ranks that go away -----------------------------------------------------------------------------


class DiesInForward(nn.Module):
    """An MLP whose rank 1 ends in its second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = make_mlp(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            os._exit(3)
        return self.body(x)


@pytest.mark.parametrize("stage", STAGES)
def test_when_a_rank_dies_in_a_step_the_others_raise_soon(stage: int) -> None:
    batches = make_batches(2, 3 * MICRO)

    def body() -> tuple[str, str]:
        engine = start(config_for(stage), model=DiesInForward(), make_optimizer=sgd)
        step_each(engine, engine.optimizer, list(my_micro_batches(batches[0])))
        try:
            step_each(engine, engine.optimizer, list(my_micro_batches(batches[1])))
        except DistributedError as error:
            return type(error).__name__, str(error)
        return "", ""

    outcomes = run_ranks_raw(3, body, timeout_s=LIMIT_S)
    assert not outcomes[1][0]
    for rank in (0, 2):
        succeeded, (kind, text) = outcomes[rank]
        assert succeeded
        assert kind == PeerLostError.__name__
        assert "another rank died" in text
        assert re.search(r"the collective '[^']+' failed", text)


def test_when_a_rank_raises_and_ends_the_others_raise_soon() -> None:
    batches = make_batches(1, 2 * MICRO)

    def body() -> str:
        engine = start(config_for(2), make_optimizer=sgd)
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a mistake of the client")
        try:
            step_each(engine, engine.optimizer, list(my_micro_batches(batches[0])))
        except PeerLostError as error:
            return str(error)
        return ""

    (done, text), (other_done, trace) = run_ranks_raw(2, body, timeout_s=LIMIT_S)
    assert done
    assert "look for the first error in the other ranks' logs" in text
    assert not other_done
    assert "a mistake of the client" in trace


def test_when_a_rank_never_comes_initialize_gives_up_after_the_timeout() -> None:
    def body() -> str:
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        if os.environ["RANK"] == "1":
            return "stayed away"
        try:
            zerolith.initialize(model=make_mlp(), config=config_for(0), timeout=timedelta(seconds=2))
        except PeerLostError as error:
            return str(error)
        return ""

    first, second = run_ranks(2, body, timeout_s=LIMIT_S)
    assert second == "stayed away"
    assert "rank 0 of 2 could not join the others at 127.0.0.1:" in first
    assert "within 2 s" in first


# --- sockets ----------------------------------------------------------------------------------------


def listeners() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which this process listens."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_a_single_host_listens_on_loopback_only() -> None:
    def body() -> set[tuple[str, int]]:
        engine = start(config_for(3), make_optimizer=sgd)
        step_each(engine, engine.optimizer, list(my_micro_batches(make_batches(1, 2 * MICRO)[0])))
        return listeners()

    before = {address for address, _ in listeners()}
    first, second = run_ranks(2, body)
    assert first, "rank 0 serves the store"
    assert {address for address, _ in first | second} - before <= LOOPBACK


# --- the process group's end ------------------------------------------------------------------------


def test_destroy_after_destroy_process_group_works_and_another_engine_trains_alone() -> None:
    batches = make_batches(2, MICRO)

    def body() -> None:
        engines = [start(config_for(stage), make_optimizer=sgd) for stage in STAGES]
        for engine in engines:
            step_each(engine, engine.optimizer, list(my_micro_batches(make_batches(1, 2 * MICRO)[0])))
        dist.destroy_process_group()
        for engine in engines:
            engine.destroy()
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
        for stage in STAGES:
            got = train_engine(start(config_for(stage), make_optimizer=sgd), batches)
            assert_close(got, train_plain(make_mlp(), batches, sgd))

    run_ranks(2, body)
