"""The README's table is what the files of results say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.digest import HEADER, RULE, lines_of, read_runs, spread
from benchmarks.step_time import RESULTS

ROOT = Path(__file__).parents[2]


def run(numel: int, dtype: str, **speeds: float) -> dict[str, Any]:
    rows = [
        {"engine": engine, "ratio": {"median": 1 / speed}, "peak_ratio": 0.5, "wire_mb": 1.0, "start_s": 2.0}
        for engine, speed in speeds.items()
    ]
    return {"settings": {"size": f"{numel // 10**6}m", "num_params": numel, "dtype": dtype}, "summary": rows}


def test_every_run_counts_and_models_and_engines_have_their_order() -> None:
    runs = [
        run(125_000_000, "fp32", ddp=1.0, zero3=1.1),
        run(25_000_000, "bf16", ddp=1.0, zero0=1.2, ds1=0.5),
        run(25_000_000, "bf16", ddp=1.0, zero0=1.0, fsdp2=0.75),
        run(25_000_000, "fp32", ddp=1.0),
    ]
    assert [str(line) for line in lines_of(runs)] == [
        "| 25 M fp32 | DDP | 1 | 1.00 | 0.50 | 1.0 | 2.0 |",
        "| 25 M bf16 | DDP | 2 | 1.00 | 0.50 | 1.0 | 2.0 |",
        "| 25 M bf16 | FSDP2 | 1 | 0.75 | 0.50 | 1.0 | 2.0 |",
        "| 25 M bf16 | **zerolith** stage 0 | 2 | 1.10 (1.00-1.20) | 0.50 | 1.0 | 2.0 |",
        "| 25 M bf16 | DeepSpeed stage 1 | 1 | 0.50 | 0.50 | 1.0 | 2.0 |",
        "| 125 M fp32 | DDP | 1 | 1.00 | 0.50 | 1.0 | 2.0 |",
        "| 125 M fp32 | **zerolith** stage 3 | 1 | 1.10 | 0.50 | 1.0 | 2.0 |",
    ]


def test_a_spread_tells_the_lowest_and_the_highest() -> None:
    assert spread([0.9, 1.3, 1.0]) == "1.00 (0.90-1.30)"
    assert spread([1.234]) == "1.23"


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_has_the_table_of_the_results(readme: str) -> None:
    shown = [line for line in (ROOT / readme).read_text().splitlines() if line.startswith("| ")]
    expected = [str(line) for line in lines_of(read_runs(RESULTS))]
    assert RULE in (ROOT / readme).read_text()
    assert [line for line in shown if line in expected] == expected


def test_the_english_readme_has_its_header() -> None:
    assert HEADER in (ROOT / "README.md").read_text()
