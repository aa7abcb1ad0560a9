"""Collectives are timed by operation and unit, phases by step; what is not asked for is not measured."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import pytest
import torch

from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from zerolith.comm import CommsLog, default_comm
from zerolith.comm.clock import Timing


class Slow:
    """A collective that is done at a given time."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.callback: Any = None

    def get_future(self) -> Slow:
        return self

    def add_done_callback(self, callback: Any) -> None:
        self.callback = callback

    def wait(self) -> None:
        pass


def test_what_ended_before_it_was_waited_for_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log, work = CommsLog(), Slow(0)
    pending = log.watch(work, [work], op="all_gather", name="a", sent=100)
    now[0] = 12.0
    work.callback(None)
    now[0] = 15.0
    pending.wait()
    assert log.timings["all_gather", "a"] == Timing(count=1, sent=100, hidden=2.0, exposed=0.0)
    pending = log.watch(work, [work], op="all_gather", name="b", sent=50)
    now[0] = 16.0
    work.wait = lambda: now.__setitem__(0, 19.0)  # type: ignore[method-assign]
    pending.wait()
    assert log.timings["all_gather", "b"] == Timing(count=1, sent=50, hidden=1.0, exposed=3.0)
    assert log.by_op() == {"all_gather": Timing(count=2, sent=150, hidden=3.0, exposed=3.0)}
    assert log.by_op()["all_gather"].busy == 6.0
    last = log.table().splitlines()[-1].split()
    assert last[:3] == ["all_gather", "all", "2"]
    assert last[-2] == "50%"


def steps(engine: Any, count: int) -> None:
    for batch in token_batches(count, 8):
        engine.backward(engine(batch.chunk(engine.world_size)[engine.global_rank]))
        engine.step()


def logged(stage: int) -> tuple[str, dict[str, int], dict[str, int], list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerolith").addHandler(handler)
    logging.getLogger("zerolith").setLevel(logging.INFO)
    engine = start_engine(make_gpt(), zero_config(stage, comms_logger={"enabled": True}))
    engine._sharded.comm.traffic.clear()
    engine._sharded.comm.log.clear()
    steps(engine, 2)
    by_op = engine._sharded.comm.log.by_op()
    traffic = engine._sharded.comm.traffic
    table = engine.comms_summary()
    assert all(timing.exposed >= 0 and timing.hidden >= 0 for timing in by_op.values())
    assert all(timing.busy > 0 for timing in by_op.values())
    sent = {op: timing.sent for op, timing in by_op.items()}
    counted = {op: traffic.sent[op] for op in by_op}
    engine.destroy()
    return table, sent, counted, records


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_table_has_every_unit_and_every_byte(stage: int) -> None:
    (table, sent, counted, first), (_, _, _, second) = run_ranks(2, logged, stage)
    assert sent == counted
    assert set(sent) == {"all_gather", "reduce_scatter"}
    for unit in ("root[0]", "blocks.0[0]"):
        assert re.search(rf"reduce_scatter +{re.escape(unit)}.grad +2 ", table), table
    assert table.splitlines()[0].split()[:3] == ["operation", "of", "count"]
    assert first[-1].startswith("operation"), "logged at the end, on one rank"
    assert not any(record.startswith("operation") for record in second)


def breakdown(every: int | None) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerolith").addHandler(handler)
    logging.getLogger("zerolith").setLevel(logging.INFO)
    engine = start_engine(make_gpt(), zero_config(3, wall_clock_breakdown=True, steps_per_print=every))
    steps(engine, 4)
    engine.destroy()
    return [record for record in records if "forward" in record]


@pytest.mark.parametrize(("every", "lines"), [(None, [1, 2, 3, 4]), (2, [2, 4])])
def test_phases_are_told_with_what_was_hidden(every: int | None, lines: list[int]) -> None:
    first, second = run_ranks(2, breakdown, every)
    assert second == []
    number = r"[\d.]+"
    pattern = (
        rf"step (\d): forward ({number}) ms, backward ({number}) ms, step ({number}) ms, "
        rf"gather ({number}) ms \(({number}) hidden\), reduce ({number}) ms \(({number}) hidden\)"
    )
    matches = [re.fullmatch(pattern, line) for line in first]
    assert all(matches), first
    assert [int(match[1]) for match in matches] == lines
    for match in matches:
        assert all(float(match[group]) > 0 for group in (2, 3, 4, 5, 7)), first


def test_nothing_is_timed_unless_asked_for() -> None:
    def body() -> None:
        engine = start_engine(make_gpt(), zero_config(2))
        steps(engine, 1)
        assert engine._sharded.comm.log is None
        assert engine.comms_summary() == ""
        assert engine._breakdown.line() == ""
        comm = default_comm()
        whole = torch.ones(2 * comm.size)
        assert type(comm.all_gather(whole, name="x")).__name__ == "_Pending"

    run_ranks(2, body)
