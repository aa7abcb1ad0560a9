"""Turn-taking: one engine runs at a time, for a few steps, and who goes first changes every round.

A machine that slows down for a minute then slows every engine, and ratios within a round stay fair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.fleet import Answer, Fleet
from benchmarks.job import Job
from benchmarks.measure import busy_s, loopback_bytes

IDLE_S = 0.1  # how long to listen to other traffic before a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One engine after construction; one answer per rank."""

    engine: str
    seconds: float  # from starting the processes until all are ready
    answers: list[Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A few steps of one engine, alone on the machine as far as we know."""

    engine: str
    round: int
    answers: list[Answer]  # per rank: "steps" (a list of samples), "peak_mb", "steady_mb", "cpu_s"
    sent_bytes: int  # over loopback, by all processes of the machine
    foreign_cores: float  # processors busy with something else, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything measured in a run."""

    starts: dict[str, Start]
    turns: list[Turn]
    idle_bytes_per_s: list[float]  # loopback traffic of others, sampled before each round


def turn_order(engines: Sequence[str], round_index: int) -> list[str]:
    """Rotates by one engine per round, and turns back to front on every second lap.

    Over one lap (as many rounds as engines) every engine has every position once; over two laps A follows B
    as often as B follows A.
    """
    shift = round_index % len(engines)
    order = [*engines[shift:], *engines[:shift]]
    lap = round_index // len(engines)
    return order[::-1] if lap % 2 else order


def run(fleet: Fleet, jobs: Sequence[Job], *, num_rounds: int, chunk: int, say: Callable[[str], None]) -> Record:
    """Starts the engines one after the other, then hands out turns of `chunk` steps."""
    starts = {}
    for job in jobs:
        begin = time.perf_counter()
        answers = fleet.start(job)
        starts[job.engine] = Start(engine=job.engine, seconds=time.perf_counter() - begin, answers=answers)
        say(f"{job.engine}: ready after {starts[job.engine].seconds:.1f} s")
    engines = [job.engine for job in jobs]
    turns, idle = [], []
    for round_index in range(num_rounds):
        idle.append(_idle_bytes_per_s())
        for engine in turn_order(engines, round_index):
            turns.append(_take_turn(fleet, engine, round_index=round_index, chunk=chunk))
        say(f"round {round_index + 1} of {num_rounds}")
    return Record(starts=starts, turns=turns, idle_bytes_per_s=idle)


def _take_turn(fleet: Fleet, engine: str, *, round_index: int, chunk: int) -> Turn:
    begin, busy, sent = time.perf_counter(), busy_s(), loopback_bytes()
    answers = fleet.ask(engine, {"do": "train", "steps": chunk})
    sent, busy, seconds = loopback_bytes() - sent, busy_s() - busy, time.perf_counter() - begin
    own_s = sum(answer["cpu_s"] for answer in answers)
    return Turn(
        engine=engine,
        round=round_index,
        answers=answers,
        sent_bytes=sent,
        foreign_cores=max(0.0, (busy - own_s) / seconds),
    )


def _idle_bytes_per_s() -> float:
    begin, sent = time.perf_counter(), loopback_bytes()
    time.sleep(IDLE_S)
    return (loopback_bytes() - sent) / (time.perf_counter() - begin)
