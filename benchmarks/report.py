"""From samples to what one reads: medians, paired ratios, a markdown table, JSON. Pure but for write()."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from benchmarks.fleet import Answer
from benchmarks.interleave import Record, Turn

LOSS_STEP = 8  # counted from 1
MEMORY_PEER = "ddp"


class Ratio(NamedTuple):
    """Time against the baseline in the same round; 1 is equal, 2 is twice as slow."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine's line. Times are the slowest rank's, medians over counted steps."""

    engine: str
    tokens_per_s: float
    ratio: Ratio
    wall_ms: float
    forward_ms: float
    backward_ms: float
    step_ms: float
    cpu_ms: float  # main thread of the slowest rank
    peak_mb: float
    peak_ratio: float | None  # to ddp, where it ran
    steady_mb: float
    start_s: float  # rendezvous, build, initialize; without imports
    wire_mb: float | None  # per rank and step; None where loopback does not carry it
    loss_early: float | None  # at step LOSS_STEP
    loss_last: float
    foreign_cores: float
    outside_ms: float | None = None  # of products of matrices, where these are counted


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear between the two nearest order statistics."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def paired_ratio(mine: Sequence[float], base: Sequence[float]) -> Ratio:
    """Statistics of mine[round] / base[round]."""
    ratios = [time / other for time, other in zip(mine, base, strict=True)]
    return Ratio(median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9))


def slowest(answers: Sequence[Answer]) -> list[dict[str, float]]:
    """Per step, the sample of the rank with the longest wall time."""
    return [max(samples, key=lambda sample: sample["wall_ms"]) for samples in _by_step(answers)]


def losses(answers: Sequence[Answer]) -> list[float]:
    """Per step, the mean over ranks."""
    return [fmean(sample["loss"] for sample in samples) for samples in _by_step(answers)]


def summarise(record: Record, *, baseline: str, warmup_rounds: int, tokens_per_rank: int) -> list[Row]:
    """One row per engine, in the order of starting."""
    rows = []
    round_times = {engine: _round_times(record, engine, warmup_rounds) for engine in record.starts}
    peaks = {engine: _peak_mb(record, engine) for engine in record.starts}
    for engine, start in record.starts.items():
        turns = [turn for turn in record.turns if turn.engine == engine]
        counted = [turn for turn in turns if turn.round >= warmup_rounds]
        samples = [sample for turn in counted for sample in slowest(turn.answers)]
        middle = {name: median(sample[name] for sample in samples) for name in samples[0]}
        curve = [loss for turn in turns for loss in losses(turn.answers)]
        rows.append(
            Row(
                engine=engine,
                tokens_per_s=1e3 * tokens_per_rank * len(start.answers) / middle["wall_ms"],
                ratio=paired_ratio(round_times[engine], round_times[baseline]),
                wall_ms=middle["wall_ms"],
                forward_ms=middle["forward_ms"],
                backward_ms=middle["backward_ms"],
                step_ms=middle["step_ms"],
                cpu_ms=middle["cpu_ms"],
                peak_mb=peaks[engine],
                peak_ratio=peaks[engine] / peaks[MEMORY_PEER] if MEMORY_PEER in peaks else None,
                steady_mb=max(answer["steady_mb"] for answer in turns[-1].answers),
                start_s=max(answer["rendezvous_s"] + answer["build_s"] for answer in start.answers),
                wire_mb=_wire_mb(counted) if start.answers[0]["device"] == "cpu" else None,
                loss_early=curve[LOSS_STEP - 1] if len(curve) >= LOSS_STEP else None,
                loss_last=curve[-1],
                foreign_cores=median(turn.foreign_cores for turn in counted),
                outside_ms=_outside_ms(samples),
            )
        )
    return rows


def markdown(rows: Sequence[Row], *, baseline: str, title: str, notes: Sequence[str]) -> str:
    """A table under its title, notes below."""
    header = [
        "engine", "tokens/s", f"time / {baseline} (p10-p90)", "ms", "forward", "backward", "step", "CPU ms",
        "peak MB", f"peak / {MEMORY_PEER}", "steady MB", "start-up s", "wire MB", f"loss[{LOSS_STEP}]",
        "loss[last]", "foreign cores", "outside products",
    ]  # fmt: skip
    lines = [f"**{title}**", "", _line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes), ""])


def write(path: Path, result: dict[str, object], record: Record, rows: Sequence[Row]) -> None:
    """`result` (settings, hardware, versions), the summary and every sample, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = [{**asdict(row), "ratio": row.ratio._asdict()} for row in rows]
    text = json.dumps({**result, "summary": named, "samples": asdict(record)}, indent=1)
    path.write_text(text + "\n")


def _by_step(answers: Sequence[Answer]) -> list[tuple[dict[str, float], ...]]:
    """Samples of all ranks together, per step."""
    return list(zip(*(answer["steps"] for answer in answers), strict=True))


def _round_times(record: Record, engine: str, warmup_rounds: int) -> list[float]:
    return [
        fmean(sample["wall_ms"] for sample in slowest(turn.answers))
        for turn in record.turns
        if turn.engine == engine and turn.round >= warmup_rounds
    ]


def _peak_mb(record: Record, engine: str) -> float:
    answers = [answer for turn in record.turns if turn.engine == engine for answer in turn.answers]
    return max(answer["peak_mb"] for answer in answers)


def _outside_ms(samples: Sequence[dict[str, float]]) -> float | None:
    if "products_ms" not in samples[0]:
        return None
    return median(sample["wall_ms"] - sample["products_ms"] for sample in samples)


def _wire_mb(turns: Sequence[Turn]) -> float:
    """Of the quietest turn: every step sends the same bytes, and other traffic can only add."""
    return min(turn.sent_bytes / len(turn.answers) / len(turn.answers[0]["steps"]) / 1e6 for turn in turns)


def _cells(row: Row) -> list[str]:
    return [
        row.engine,
        f"{row.tokens_per_s:.0f}",
        f"{row.ratio.median:.2f} ({row.ratio.p10:.2f}-{row.ratio.p90:.2f})",
        *(f"{value:.0f}" for value in (row.wall_ms, row.forward_ms, row.backward_ms, row.step_ms, row.cpu_ms)),
        f"{row.peak_mb:.0f}",
        _or_dash(row.peak_ratio, ".2f"),
        f"{row.steady_mb:.0f}",
        f"{row.start_s:.1f}",
        _or_dash(row.wire_mb, ".1f"),
        _or_dash(row.loss_early, ".4f"),
        f"{row.loss_last:.4f}",
        f"{row.foreign_cores:.2f}",
        _or_dash(row.outside_ms, ".0f"),
    ]


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
