"""Collectives are timed by operation and unit, phases by step; what is not asked for is not measured."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from zerolith.comm import CommsLog, default_comm
from zerolith.comm.clock import Timing
from zerolith.errors import ConfigError


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
        assert engine._phase._watchers == []
        comm = default_comm()
        whole = torch.ones(2 * comm.size)
        assert type(comm.all_gather(whole, name="x")).__name__ == "_Pending"

    run_ranks(2, body)


# --- operations, traces -----------------------------------------------------------------------------

TOKENS, WIDTH = 8, 16


class Line(nn.Module):
    """Two layers: 2 * tokens * width * width operations each in forward, and twice that in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


PER_LAYER = 2 * TOKENS * WIDTH * WIDTH
# The gradient of the first layer's input is not wanted.
FLOPS = {"forward": 2 * PER_LAYER, "backward": 3 * PER_LAYER}


def counted(stage: int, path: str) -> tuple[dict[str, int], str]:
    settings = {"enabled": True, "profile_step": 2, "output_file": path}
    config = zero_config(stage, gradient_accumulation_steps=2, flops_profiler=settings, zerolith={"peak_tflops": 1e-3})
    engine = start_engine(Line(), config)
    (count,) = engine._phase._watchers
    for _ in range(3 * 2):
        engine.backward(engine(torch.ones(TOKENS, WIDTH)))
        engine.step()
    engine.destroy()
    return dict(count._flops), count.report


@pytest.mark.parametrize("stage", [0, 3])
def test_operations_of_one_step_are_those_of_its_matrix_products(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "flops.txt"
    for flops, report in run_ranks(2, counted, stage, str(path)):
        assert flops == {name: 2 * count for name, count in FLOPS.items()}, "two micro-batches"
        assert report.startswith("step 2: ")
        assert "% of 0.001 TFLOP/s" in report
    text = path.read_text()
    assert "forward" in text
    assert "aten.mm" in text


def count_after_a_resume(folder: str) -> None:
    settings = {"enabled": True, "profile_step": 2, "output_file": f"{folder}/missing/flops.txt"}
    for steps in (5, 3):
        config = zero_config(1, flops_profiler=settings, zerolith={"peak_tflops": 1e-3})
        engine = start_engine(Line(), config)
        if steps == 3:
            engine.load_checkpoint(folder)
        (count,) = engine._phase._watchers
        for _ in range(steps):
            engine.backward(engine(torch.ones(TOKENS, WIDTH)))
            engine.step()
        assert count.report.startswith("step 2: "), "of this run; and a file that cannot be written ends nothing"
        engine.save_checkpoint(folder)
        engine.destroy()


def test_operations_are_counted_in_a_run_that_goes_on(tmp_path: Path) -> None:
    run_ranks(2, count_after_a_resume, str(tmp_path))


def traced(folder: str, leave_early: bool) -> None:
    trace = {"first_step": 2, "last_step": 9 if leave_early else 3, "folder": folder}
    engine = start_engine(Line(), zero_config(1, zerolith={"trace": trace}))
    for _ in range(4):
        engine.backward(engine(torch.ones(TOKENS, WIDTH)))
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("leave_early", [False, True])
def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path, leave_early: bool) -> None:
    run_ranks(2, traced, str(tmp_path / "trace"), leave_early)
    for rank in range(2):
        events = json.loads((tmp_path / "trace" / f"rank{rank}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
        phases = Counter(name for name in names if str(name).startswith("zerolith"))
        assert phases == {f"zerolith {phase}": 3 if leave_early else 2 for phase in ("forward", "backward", "step")}


def test_a_trace_of_the_first_step_and_a_wrong_folder(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trace": {"first_step": 1, "folder": str(tmp_path)}}
    engine = start_engine(Line(), zero_config(0, zerolith=settings))
    engine.backward(engine(torch.ones(TOKENS, WIDTH)))
    engine.step()
    assert (tmp_path / "rank0.json").exists()
    (tmp_path / "file").write_text("")
    settings["trace"]["folder"] = str(tmp_path / "file" / "inside")
    with pytest.raises(ConfigError, match=r"zerolith.trace.folder"):
        start_engine(Line(), zero_config(0, zerolith=settings))
