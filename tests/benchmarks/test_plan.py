"""Command lines become plans, or a message."""

from __future__ import annotations

import pytest
from benchmarks.engines import ENGINES
from benchmarks.job import SIZES, Job
from benchmarks.step_time import Plan, make_plan, parse_arguments


def plan(line: str) -> Plan:
    return make_plan(parse_arguments(line.split()))


def test_steps_become_rounds() -> None:
    made = plan("--engines fsdp2,ddp,zero3 --steps 12 --chunk 2 --warmup 3")
    assert (made.num_rounds, made.warmup_rounds) == (6, 2)
    assert [job.engine for job in made.jobs] == ["fsdp2", "ddp", "zero3"]


@pytest.mark.parametrize(
    ("line", "baseline"),
    [
        ("--engines fsdp2,ddp", "ddp"),
        ("--engines zero3,ds3", "zero3"),
        ("--engines zero3,ds3 --baseline ds3", "ds3"),
    ],
)
def test_the_baseline_is_ddp_where_it_runs(line: str, baseline: str) -> None:
    assert plan(line).baseline == baseline


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--engines ddp,zero9", "zero9"),
        ("--engines ddp --baseline fsdp2", "fsdp2"),
        ("--steps 7 --chunk 2", "multiple of --chunk 2"),
        ("--steps 2 --chunk 2 --warmup 1", "leave a round"),
    ],
)
def test_a_line_that_cannot_run_says_why(line: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        plan(line)


def test_a_job_reaches_its_ranks_unchanged() -> None:
    job = Job(engine="zero3", size="125m", dtype="bf16", device="cpu", seed=3)
    assert Job.from_json(job.to_json()) == job


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="positions"):
        Job(engine="ddp", size="tiny", dtype="fp32", device="cpu", seq=SIZES["tiny"].positions + 1)


def test_every_stage_of_both_libraries_is_listed() -> None:
    assert {f"{prefix}{stage}" for prefix in ("ds", "zero") for stage in range(4)} <= set(ENGINES)
