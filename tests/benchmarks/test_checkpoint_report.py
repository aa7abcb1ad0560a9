"""Speeds and ratios of saves and loads, from repeats written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.checkpoint.report import Floors, Row, choose_floors, counted, markdown, summarise, write
from benchmarks.checkpoint.turns import Record, Repeat

GB = 10**9
FLOORS = Floors(save="direct16", load="plain16")


def repeat(
    contender: str, round_index: int, number: int, *, save_s: float, cold_s: float, warm_s: float | None = 0.5
) -> Repeat:
    return Repeat(
        contender=contender,
        round=round_index,
        number=number,
        stall_s=save_s / 2,
        save_s=save_s,
        cold_s=cold_s,
        warm_s=warm_s,
        disk_bytes=GB + round_index,
        save_mb=100.0 if number == 0 else 10.0,
        load_mb=20.0,
        foreign_cores=0.25,
        answers={},
    )


def record(*, warm_s: float | None = 0.5) -> Record:
    """Three rounds of two repeats, the first of them slow; round 1 is twice as slow for all."""
    seconds = {"plain16": (2.0, 1.0), "direct16": (1.0, 2.0), "zero3": (1.25, 1.0), "torch_mmap": (4.0, 4.0)}
    repeats = [
        repeat(name, index, number, save_s=slow * save, cold_s=slow * cold, warm_s=warm_s)
        for index, pace in enumerate((1.0, 2.0, 1.0))
        for name, (save, cold) in seconds.items()
        for number, slow in enumerate((9 * pace, pace))
    ]
    return Record(starts={}, repeats=repeats)


def rows(*, warm_s: float | None = 0.5) -> dict[str, Row]:
    made = summarise(record(warm_s=warm_s), state_bytes=GB, num_repeats=2, floors=FLOORS)
    return {row.contender: row for row in made}


def test_the_first_repeat_of_a_turn_does_not_count() -> None:
    assert {each.number for each in counted(record(), num_repeats=2)} == {1}


def test_a_turn_of_one_repeat_counts() -> None:
    assert len(counted(record(), num_repeats=1)) == len(record().repeats)


def test_the_floor_is_the_fastest_plain_way_and_no_contender() -> None:
    assert choose_floors(counted(record(), num_repeats=2)) == FLOORS


def test_speeds_are_medians_over_rounds() -> None:
    zero3 = rows()["zero3"]
    assert (zero3.save_gb_per_s, zero3.load_gb_per_s, zero3.warm_gb_per_s) == pytest.approx((0.8, 1.0, 2.0))
    assert zero3.stall_s == pytest.approx(0.625)


def test_ratios_are_speeds_within_a_round() -> None:
    zero3 = rows()["zero3"]
    assert zero3.save_ratio == pytest.approx((0.8, 0.8, 0.8))
    assert zero3.load_ratio == pytest.approx((1.0, 1.0, 1.0))
    assert rows()["torch_mmap"].save_ratio.median == pytest.approx(0.25)


def test_memory_is_the_largest_also_of_repeats_that_do_not_count() -> None:
    """What a first save keeps for the next is no less memory."""
    assert (rows()["zero3"].save_mb, rows()["zero3"].load_mb) == (100.0, 20.0)


def test_the_table_has_a_cell_for_every_heading() -> None:
    made = list(rows().values())
    lines = markdown(made, floors=FLOORS, title="a title", notes=["a note"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(made)
    assert len({line.count("|") for line in table}) == 1
    assert "save / direct16" in table[0]
    assert "load / plain16" in table[0]
    assert table[4].startswith(
        "| zero3 | 0.80 | 0.80 (0.80-0.80) | 0.62 | 1.00 | 1.00 (1.00-1.00) | 2.00 | 1.00 | 100 |"
    )
    assert (lines[0], lines[-1]) == ("**a title**", "* a note")


def test_who_does_not_sync_is_marked() -> None:
    text = markdown(list(rows().values()), floors=FLOORS, title="", notes=[])
    assert "| torch_mmap* |" in text
    assert "| zero3 |" in text


def test_what_was_not_measured_is_a_dash() -> None:
    zero3 = rows(warm_s=None)["zero3"]
    assert zero3.warm_gb_per_s is None
    assert "| - |" in markdown([zero3], floors=FLOORS, title="", notes=[])


def test_the_file_holds_settings_summary_and_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write(path, {"command": "python"}, record(), list(rows().values()))
    result = json.loads(path.read_text())
    assert result["command"] == "python"
    assert result["summary"][2]["save_ratio"]["median"] == pytest.approx(0.8)
    assert len(result["samples"]["repeats"]) == 24
