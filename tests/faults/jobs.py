"""Jobs of forked ranks that may die: how each rank ended, in bounded time, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

import zerolith
from harness import _free_port

gc.collect()
gc.freeze()  # collections in forked ranks need not go through, and thereby copy, what the parent has loaded

LIMIT_S = 20.0  # in which every process must have ended; a collective's own timeout is thirty times as long
TELL: list[Callable[[Any], None]] = []  # in a rank: how `tell` reaches the parent


class Ended(NamedTuple):
    """How a rank ended."""

    status: int  # exit status, or minus the signal that ended it
    told: list[Any]  # what its body told, in order
    result: Any  # what its body returned; None if it did not
    kind: str  # of the exception that ended it
    text: str  # of that
    seconds: float  # from the job's start


def run_job(world: int, body: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Ended]:
    """`body(*args)` in `world` ranks of one process group, to their end."""
    return Job(world, body, *args).end(limit_s=limit_s)


def tell(value: Any) -> None:
    """In a rank: send a value to the parent."""
    TELL[0](value)


class Job:
    """Ranks of a job, running: processes of one group, which `die(takes_all=True)` ends together.

    prepare: called in each rank with its number, before all else; by default it joins the others by gloo.
    """

    def __init__(
        self, world: int, body: Callable[..., Any], *args: Any, prepare: Callable[[int], object] | None = None
    ) -> None:
        context = mp.get_context("fork")
        port = _free_port()
        self.pids: list[int] = []
        self._pipes: list[Connection] = []
        self._processes = []
        self._told: list[list[Any]] = [[] for _ in range(world)]
        self._last: dict[int, tuple[Any, str, str]] = {}
        start, starter = context.Pipe(duplex=False)
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            foreign = [*self._pipes, reader, starter]
            given = (rank, world, port, prepare, start, writer, foreign, body, args)
            process = context.Process(target=_rank_main, args=given, daemon=True)
            process.start()
            assert process.pid is not None, "it has been started"
            self.pids.append(process.pid)
            os.setpgid(process.pid, self.pids[0])
            writer.close()
            self._pipes.append(reader)
            self._processes.append(process)
        self._started = time.monotonic()
        starter.close()
        start.close()

    def told(self, rank: int, *, limit_s: float = LIMIT_S) -> Any:
        """The next value that this rank tells."""
        deadline = time.monotonic() + limit_s
        while not self._told[rank]:
            assert self._pipes[rank].poll(max(0, deadline - time.monotonic())), f"rank {rank} has told nothing"
            assert self._receive(rank), f"rank {rank} ended without telling anything"
        return self._told[rank].pop(0)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def end(self, *, limit_s: float = LIMIT_S) -> list[Ended]:
        """Wait for all ranks. Fails if one has not ended by itself in time, or has left processes behind."""
        deadline = time.monotonic() + limit_s
        running = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        seconds: dict[int, float] = {}
        while running:
            ready = wait(list(running), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection), "only pipes are waited for"
                if not self._receive(running[pipe]):
                    seconds[running.pop(pipe)] = time.monotonic() - self._started
        for process in self._processes:
            process.join(timeout=max(0.2, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self._processes) if process.exitcode is None]
        has_orphans = self._put_away()
        assert not late, f"ranks {late} have not ended within {limit_s} s"
        assert not has_orphans, "processes of the job are left"
        return [self._ended(rank, seconds[rank]) for rank in range(len(self.pids))]

    def _receive(self, rank: int) -> bool:
        """Take one message; whether there was one rather than the end."""
        try:
            is_last, value = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            return False
        if is_last:
            self._last[rank] = value
        else:
            self._told[rank].append(value)
        return True

    def _ended(self, rank: int, seconds: float) -> Ended:
        status = self._processes[rank].exitcode
        assert status is not None, "it was waited for"
        return Ended(status, self._told[rank], *self._last.get(rank, (None, "", "")), seconds=seconds)

    def _put_away(self) -> bool:
        """End what still runs; whether something other than the ranks did."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        orphans = living(self.pids[0])
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        return bool(orphans)


def living(group: int) -> list[int]:
    """The processes of a group, without those that wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(of) == group and state not in "ZX" else []
    return found


def _rank_main(
    rank: int,
    world: int,
    port: int,
    prepare: Callable[[int], object] | None,
    start: Connection,
    writer: Connection,
    foreign: list[Connection],
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    for pipe in foreign:
        pipe.close()
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    start.poll(None)  # until its other end is closed: by then all ranks are in one process group
    TELL[:] = [lambda value: writer.send_bytes(pickle.dumps((False, value)))]
    try:
        if prepare is not None:
            prepare(rank)
        elif world > 1:
            zerolith.init_distributed("gloo")
        last, status = (body(*args), "", ""), 0
    except SystemExit as error:
        last, status = (None, "SystemExit", str(error)), error.code
    except BaseException as error:
        last, status = (None, type(error).__name__, str(error)), 1
    with contextlib.suppress(BrokenPipeError):
        writer.send_bytes(pickle.dumps((True, last)))
    raise SystemExit(
        status
    )  # as at the interpreter's end, threads are waited for; the parent's exit handlers do not run
