"""Command lines become plans of saves and loads, or a message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.checkpoint.__main__ import Plan, check_folder, make_plan, needed_bytes, parse_arguments
from benchmarks.checkpoint.contenders import CONTENDERS, DEFAULT
from benchmarks.checkpoint.job import SIZES, StoreJob
from benchmarks.engines import ENGINES
from benchmarks.gpt import GPT

GB = 10**9


def plan(line: str, *, memory_gb: float = 20.0) -> Plan:
    return make_plan(parse_arguments(line.split()), memory_bytes=memory_gb * GB)


def names(made: Plan) -> list[str]:
    return [job.contender for job in made.jobs]


@pytest.mark.parametrize("size", SIZES)
def test_the_state_is_that_of_the_model(size: str) -> None:
    with torch.device("meta"):
        numel = sum(param.numel() for param in GPT(SIZES[size]).parameters())
    job = StoreJob.of("zero1", size)
    assert (job.num_params, job.state_bytes) == (numel, 12 * numel)


def test_every_contender_has_an_interpreter() -> None:
    assert {entry.engine for entry in CONTENDERS.values()} <= set(ENGINES)
    assert set(DEFAULT.split(",")) <= set(CONTENDERS)


def test_a_job_reaches_its_ranks_unchanged() -> None:
    job = StoreJob.of("dcp_async", "1b")
    assert StoreJob.from_json(job.to_json()) == job


def test_contenders_come_once_and_in_order() -> None:
    assert names(plan("--contenders zero3,plain16,zero3,torch --size 125m")) == ["zero3", "plain16", "torch"]


@pytest.mark.parametrize(
    ("world", "left_out"),
    [(1, ["zero1_async", "torch"]), (2, ["zero1_async", "torch"])],
)
def test_what_does_not_fit_into_memory_is_left_out(world: int, left_out: list[str]) -> None:
    line = f"--contenders direct16,zero1,zero1_async,zero3,torch,torch_mmap --size 1b --world {world}"
    made = plan(line)
    assert made.left_out == left_out
    assert not set(left_out) & set(names(made))
    assert plan(line, memory_gb=64).left_out == []


def test_replicated_weights_count_for_every_rank() -> None:
    """At stage 1, each of two ranks has the whole weights: a third of the state more than at stage 3."""
    stage1, stage3 = (needed_bytes(StoreJob.of(name, "1b"), 2) for name in ("zero1", "zero3"))
    assert stage1 - stage3 == pytest.approx(StoreJob.of("zero1", "1b").state_bytes / 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--contenders plain1,zero9", "zero9"),
        ("--contenders zero1,torch", "no floor"),
        ("--contenders plain1 --repeats 0", "at least 1"),
    ],
)
def test_a_line_that_cannot_run_says_why(line: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        plan(line)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere"):
        check_folder(tmp_path / "nowhere", 1)


def test_a_state_that_does_not_fit_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="are needed"):
        check_folder(tmp_path, 10**18)
