"""Statistics and tables, from records written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.interleave import Record, Start, Turn
from benchmarks.report import (
    Row,
    losses,
    markdown,
    paired_ratio,
    quantile,
    slowest,
    summarise,
    write,
)

TOKENS_PER_RANK = 512


def sample(wall_ms: float, loss: float = 9.0) -> dict[str, float]:
    return {
        "wall_ms": wall_ms,
        "forward_ms": 0.25 * wall_ms,
        "backward_ms": 0.5 * wall_ms,
        "step_ms": 0.25 * wall_ms,
        "cpu_ms": 0.9 * wall_ms,
        "other_threads_ms": 0.0,
        "loss": loss,
    }


def turn(engine: str, round_index: int, wall_ms: float, *, peak_mb: float, sent_bytes: int) -> Turn:
    """Two ranks, one step: rank 1 is 10 ms slower and its loss is 1 lower."""
    memory = {"peak_mb": peak_mb, "steady_mb": peak_mb - 1, "cpu_s": 0.1}
    answers = [
        {"steps": [sample(wall_ms - 10, loss=9.0 - round_index)], **memory},
        {"steps": [sample(wall_ms, loss=8.0 - round_index)], **memory},
    ]
    return Turn(engine=engine, round=round_index, answers=answers, sent_bytes=sent_bytes, foreign_cores=0.25)


def record() -> Record:
    """ddp and zero1; round 0 is warm-up; round 3 is twice as slow for both, as on a machine with a guest."""
    start = {"rendezvous_s": 0.5, "build_s": 1.0, "device": "cpu"}
    starts = {
        name: Start(engine=name, seconds=9.0, answers=[start, {**start, "build_s": 2.0}]) for name in ("ddp", "zero1")
    }
    ddp = [5000.0, 100.0, 100.0, 200.0]
    zero1 = [7000.0, 80.0, 80.0, 160.0]
    turns = [
        turn(name, index, wall, peak_mb=peak + index, sent_bytes=2_000_000 + 1000 * index)
        for name, times, peak in (("ddp", ddp, 997.0), ("zero1", zero1, 497.0))
        for index, wall in enumerate(times)
    ]
    return Record(starts=starts, turns=turns, idle_bytes_per_s=[0.0])


def rows() -> list[Row]:
    return summarise(record(), baseline="ddp", warmup_rounds=1, tokens_per_rank=TOKENS_PER_RANK)


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1.0), (0.1, 1.4), (0.5, 3.0), (0.9, 4.6), (1.0, 5.0)])
def test_quantiles_are_linear_between_neighbours(fraction: float, value: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], fraction) == pytest.approx(value)


def test_ratios_are_taken_within_a_round() -> None:
    """A round that is slow for both does not move the ratio; a ratio of medians would be 1."""
    assert paired_ratio([10.0, 300.0, 2.0], [20.0, 600.0, 4.0]) == (0.5, 0.5, 0.5)
    assert paired_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == pytest.approx((2.0, 1.2, 2.8))


def test_ratios_of_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])


def test_a_step_is_as_long_as_its_slowest_rank() -> None:
    answers = [{"steps": [sample(10), sample(40)]}, {"steps": [sample(30), sample(20)]}]
    assert [step["wall_ms"] for step in slowest(answers)] == [30, 40]


def test_a_loss_is_the_mean_over_ranks() -> None:
    answers = [{"steps": [sample(1, loss=4.0)]}, {"steps": [sample(1, loss=5.0)]}]
    assert losses(answers) == [4.5]


def test_a_row_holds_medians_of_counted_rounds() -> None:
    ddp, zero1 = rows()
    assert (ddp.wall_ms, zero1.wall_ms) == (100.0, 80.0)
    assert zero1.tokens_per_s == pytest.approx(2 * TOKENS_PER_RANK / 0.080)
    assert zero1.ratio == pytest.approx((0.8, 0.8, 0.8))
    assert (zero1.forward_ms, zero1.backward_ms, zero1.step_ms) == (20.0, 40.0, 20.0)
    assert zero1.start_s == 2.5
    assert zero1.loss_last == 5.5


def test_memory_is_the_highest_peak_and_the_last_rest() -> None:
    ddp, zero1 = rows()
    assert (ddp.peak_mb, zero1.peak_mb) == (1000.0, 500.0)
    assert (ddp.peak_ratio, zero1.peak_ratio) == (1.0, 0.5)
    assert zero1.steady_mb == 499.0


def test_wire_bytes_are_per_rank_and_step_of_the_quietest_counted_turn() -> None:
    assert rows()[0].wire_mb == pytest.approx(1.0005)


def test_wire_bytes_are_not_claimed_for_a_device() -> None:
    on_cpu = record()
    starts = {
        name: replace(start, answers=[{**answer, "device": "a GPU"} for answer in start.answers])
        for name, start in on_cpu.starts.items()
    }
    on_gpu = replace(on_cpu, starts=starts)
    summary = summarise(on_gpu, baseline="ddp", warmup_rounds=1, tokens_per_rank=TOKENS_PER_RANK)
    assert [row.wire_mb for row in summary] == [None, None]


def test_the_table_has_a_cell_for_every_heading() -> None:
    lines = markdown(rows(), baseline="ddp", title="a title", notes=["a note"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert table[3].startswith("| zero1 | 12800 | 0.80 (0.80-0.80) | 80 | 20 | 40 | 20 | 72 | 500 | 0.50 |")
    assert lines[0] == "**a title**"
    assert lines[-1] == "* a note"


def test_what_was_not_measured_is_a_dash() -> None:
    """Four steps are too few for loss[8]; without ddp there is no ratio to its memory; products are not counted."""
    row = replace(rows()[0], peak_ratio=None, wire_mb=None)
    cells = [cell.strip() for cell in markdown([row], baseline="ddp", title="", notes=[]).splitlines()[4].split("|")]
    assert cells.count("-") == 4


def test_the_file_holds_settings_summary_and_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write(path, {"command": "python"}, record(), rows())
    result = json.loads(path.read_text())
    assert result["command"] == "python"
    assert result["summary"][1]["ratio"]["median"] == pytest.approx(0.8)
    assert len(result["samples"]["turns"]) == 8
    assert result["samples"]["turns"][0]["answers"][1]["steps"][0]["wall_ms"] == 5000.0
