"""All runs of step_time in a folder as one short table, which the README has: a row per model, dtype and engine.

python -m benchmarks.digest
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.step_time import RESULTS

HEADER = "| model | engine | runs | tokens/s vs DDP | peak memory vs DDP | MB sent per step | start-up, s |"
RULE = "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
NAMES = {
    "floor": "floor: nothing exchanged",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero": "**zerolith** stage ",
    "ds": "DeepSpeed stage ",
}

Summary = Mapping[str, Any]  # one engine's of one run, as report.write puts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One engine over all runs of a model and dtype."""

    model: str
    engine: str
    speeds: Sequence[float]  # tokens/s, by that of DDP: the median over rounds, of each run
    peaks: Sequence[float]  # memory, by that of DDP
    wire_mb: float
    start_s: float

    def __str__(self) -> str:
        cells = [
            self.model,
            name_of(self.engine),
            str(len(self.speeds)),
            spread(self.speeds),
            f"{median(self.peaks):.2f}",
            f"{self.wire_mb:.1f}",
            f"{self.start_s:.1f}",
        ]
        return f"| {' | '.join(cells)} |"


def name_of(engine: str) -> str:
    """As people know it."""
    kind = kind_of(engine)
    return NAMES[kind] + engine[len(kind) :]


def kind_of(engine: str) -> str:
    """Without its stage."""
    return engine if engine in NAMES else engine.rstrip("0123")


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and highest where they differ."""
    middle = f"{median(values):.2f}"
    return f"{middle} ({min(values):.2f}-{max(values):.2f})" if max(values) > min(values) else middle


def lines_of(runs: Iterable[Mapping[str, Any]]) -> list[Line]:
    """One per model, dtype and engine, smaller models and fp32 first; engines in the order of their names' kinds."""
    found: dict[tuple[int, str, str], list[Summary]] = {}
    for run in runs:
        settings = run["settings"]
        for row in run["summary"]:
            model = f"{settings['size'].upper().replace('M', ' M')} {settings['dtype']}"
            found.setdefault((settings["num_params"], model, row["engine"]), []).append(row)
    kinds = list(NAMES)
    order = sorted(found, key=lambda key: (key[0], not key[1].endswith("fp32"), kinds.index(kind_of(key[2])), key[2]))
    return [
        Line(
            model=model,
            engine=engine,
            speeds=[1 / row["ratio"]["median"] for row in rows],
            peaks=[row["peak_ratio"] for row in rows],
            wire_mb=median(row["wire_mb"] for row in rows),
            start_s=median(row["start_s"] for row in rows),
        )
        for numel, model, engine in order
        for rows in [found[numel, model, engine]]
    ]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The results of step_time there whose engines are all in the table."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        run
        for run in runs
        if "dtype" in run.get("settings", {}) and not any("disk" in row["engine"] for row in run["summary"])
    ]


def main() -> int:
    print(HEADER, RULE, *lines_of(read_runs(RESULTS)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
