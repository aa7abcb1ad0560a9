"""From repeats to what one reads: medians, ratios to the floor of the same round, a markdown table, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.checkpoint.contenders import CONTENDERS
from benchmarks.checkpoint.turns import Record, Repeat
from benchmarks.report import Ratio, paired_ratio

UNSYNCED = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Which of the plain ways was the fastest, by its median; what the ratios are to."""

    save: str
    load: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender's line. Speeds are of the state's bytes, whatever the contender writes."""

    contender: str
    save_gb_per_s: float
    save_ratio: Ratio  # speed over the floor's; 1 is as fast
    stall_s: float
    load_gb_per_s: float
    load_ratio: Ratio
    warm_gb_per_s: float | None
    disk_gb: float
    save_mb: float  # memory above the model's own: the largest of all repeats
    load_mb: float
    foreign_cores: float


def counted(record: Record, *, num_repeats: int) -> list[Repeat]:
    """Without the first of each turn, where there are others: it makes what the process keeps."""
    return [repeat for repeat in record.repeats if repeat.number > 0 or num_repeats == 1]


def choose_floors(repeats: Sequence[Repeat]) -> Floors:
    names = [name for name in _names(repeats) if CONTENDERS[name].is_floor]
    return Floors(
        save=min(names, key=lambda name: median(_by_round(repeats, name, "save_s"))),
        load=min(names, key=lambda name: median(_by_round(repeats, name, "cold_s"))),
    )


def summarise(record: Record, *, state_bytes: int, num_repeats: int, floors: Floors) -> list[Row]:
    """One row per contender, in the order of the first round."""
    repeats, gb = counted(record, num_repeats=num_repeats), state_bytes / 1e9
    rows = []
    for name in _names(repeats):
        mine = [repeat for repeat in repeats if repeat.contender == name]
        everything = [repeat for repeat in record.repeats if repeat.contender == name]
        saves, loads = _by_round(repeats, name, "save_s"), _by_round(repeats, name, "cold_s")
        warm = [repeat.warm_s for repeat in mine if repeat.warm_s is not None]
        rows.append(
            Row(
                contender=name,
                save_gb_per_s=gb / median(saves),
                save_ratio=paired_ratio(_by_round(repeats, floors.save, "save_s"), saves),
                stall_s=median(repeat.stall_s for repeat in mine),
                load_gb_per_s=gb / median(loads),
                load_ratio=paired_ratio(_by_round(repeats, floors.load, "cold_s"), loads),
                warm_gb_per_s=gb / median(warm) if warm else None,
                disk_gb=mine[-1].disk_bytes / 1e9,
                save_mb=max(repeat.save_mb for repeat in everything),
                load_mb=max(repeat.load_mb for repeat in everything),
                foreign_cores=median(repeat.foreign_cores for repeat in mine),
            )
        )
    return rows


def markdown(rows: Sequence[Row], *, floors: Floors, title: str, notes: Sequence[str]) -> str:
    """A table under its title, notes below."""
    header = [
        "contender", "save GB/s", f"save / {floors.save} (p10-p90)", "stall s", "load GB/s",
        f"load / {floors.load} (p10-p90)", "cached load GB/s", "on disk GB", "save MB", "load MB", "foreign cores",
    ]  # fmt: skip
    lines = [f"**{title}**", "", _line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), ""])


def write(path: Path, result: dict[str, object], record: Record, rows: Sequence[Row]) -> None:
    """`result` (settings, hardware, versions), the summary and every sample, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ratios = ("save_ratio", "load_ratio")
    named = [{**asdict(row), **{name: getattr(row, name)._asdict() for name in ratios}} for row in rows]
    path.write_text(json.dumps({**result, "summary": named, "samples": asdict(record)}, indent=1) + "\n")


def _names(repeats: Sequence[Repeat]) -> list[str]:
    return list(dict.fromkeys(repeat.contender for repeat in repeats))


def _by_round(repeats: Sequence[Repeat], name: str, field: str) -> list[float]:
    """The mean of each round, in the order of rounds."""
    mine = [repeat for repeat in repeats if repeat.contender == name]
    rounds = sorted({repeat.round for repeat in mine})
    return [fmean(getattr(repeat, field) for repeat in mine if repeat.round == number) for number in rounds]


def _cells(row: Row) -> list[str]:
    return [
        row.contender + ("" if CONTENDERS[row.contender].syncs else UNSYNCED),
        f"{row.save_gb_per_s:.2f}",
        _shown(row.save_ratio),
        f"{row.stall_s:.2f}",
        f"{row.load_gb_per_s:.2f}",
        _shown(row.load_ratio),
        "-" if row.warm_gb_per_s is None else f"{row.warm_gb_per_s:.2f}",
        f"{row.disk_gb:.2f}",
        f"{row.save_mb:.0f}",
        f"{row.load_mb:.0f}",
        f"{row.foreign_cores:.2f}",
    ]


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
