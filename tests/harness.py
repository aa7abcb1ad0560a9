"""Rank processes for tests: forked, so that two ranks are up in a fraction of a second."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

import zerolith

TIMEOUT_S = 90.0


class RankFailed(AssertionError):
    """A rank raised or died; the message holds every failed rank's traceback."""


def run_ranks(world: int, body: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Run `body(*args)` in `world` forked ranks of one process group; returns their results by rank.

    Raises RankFailed with the tracebacks if a rank raises, dies or is not done in time.
    """
    outcomes = run_ranks_raw(world, body, *args, timeout_s=timeout_s)
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if not outcome[0]}
    if failed:
        raise RankFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, (_, text) in failed.items()))
    return [result for _, result in outcomes]


def run_ranks_raw(
    world: int, body: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
) -> list[tuple[bool, Any]]:
    """As run_ranks, but returns (succeeded, result or traceback) for each rank."""
    context = mp.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(rank, world, port, writer, body, args), daemon=True)
        process.start()
        writer.close()
        pipes.append(reader)
        processes.append(process)
    outcomes = _collect(pipes, time.monotonic() + timeout_s)
    for process in processes:
        process.join(timeout=0.2)
        if process.is_alive():
            process.kill()
            process.join()
    return outcomes


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    while len(outcomes) < len(pipes):
        left = deadline - time.monotonic()
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        ready = wait(list(pending), timeout=max(left, 0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection), "only pipes are waited for"
            try:
                outcomes[pending[pipe]] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[pending[pipe]] = (False, "the process died without a word")
    return [outcomes.get(rank, (False, "not done in time")) for rank in range(len(pipes))]


def _rank_main(
    rank: int, world: int, port: int, writer: Connection, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # first, or a fork after a backward in the parent can hang
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        if world > 1:
            zerolith.init_distributed("gloo")
        outcome = (True, body(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    writer.send_bytes(pickle.dumps(outcome))  # not send(): that shares tensors through files that die with us
    writer.close()
    if dist.is_initialized() and outcome[0]:
        dist.destroy_process_group()
    os._exit(0)  # nothing of the parent's pytest session may run here


def _free_port() -> int:
    """A port that no other test uses; below those that the system hands to outgoing connections in between."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
