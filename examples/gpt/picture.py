"""The one picture of a run: its losses, and the memory of each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from gpt.memory import STAGES, StageBytes
from gpt.records import MeasuredBytes, StepRecord

MIB = 2**20
BAR_WIDTH = 0.4
COLOURS = {"parameters": "#4477aa", "gradients": "#ee8866", "optimizer": "#228833"}


def draw_losses(axes: Axes, records: Sequence[StepRecord], *, bigram: float) -> None:
    """Training and validation loss by step, with the baseline as a line."""
    training = [(record.step, record.loss) for record in records if record.loss is not None]
    validation = [(record.step, record.val_loss) for record in records if record.val_loss is not None]
    axes.plot(*zip(*training, strict=True), color="#4477aa", linewidth=1.2, label="training")
    axes.plot(*zip(*validation, strict=True), "o", color="#ee8866", markersize=5, label="validation")
    axes.axhline(bigram, color="#666666", linestyle="--", linewidth=1, label=f"bigram model: {bigram:.3f}")
    step, loss = validation[-1]
    axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(-4, 8), ha="right")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_memory(
    axes: Axes, by_stage: Sequence[StageBytes], *, measured: MeasuredBytes, stage: int, ranks: int
) -> None:
    """Model state per rank at each stage by the formulas, and this run's beside its stage."""
    offset = BAR_WIDTH / 2
    for number, planned in zip(STAGES, by_stage, strict=True):
        _stack(axes, number - offset, planned, hatch="")
        axes.text(number - offset, planned.total / MIB, f"{planned.total / MIB:.1f}", ha="center", va="bottom")
    _stack(axes, stage + offset, measured, hatch="//")
    total = sum(measured) / MIB
    axes.text(stage + offset, total, f"{total:.1f}\nmeasured", ha="center", va="bottom", weight="bold")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, ["parameters", "gradients", "optimizer states"], loc="upper right")
    axes.set_xticks(STAGES, [f"stage {number}" for number in STAGES])
    axes.set(title=f"Model state per rank, {ranks} ranks", ylabel="MiB")
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.3)


def _stack(axes: Axes, x: float, heights: StageBytes | MeasuredBytes, *, hatch: str) -> None:
    bottom = 0.0
    for kind, colour in COLOURS.items():
        height = getattr(heights, kind) / MIB
        axes.bar(x, height, BAR_WIDTH, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        bottom += height


def draw_run(
    path: Path,
    records: Sequence[StepRecord],
    *,
    title: str,
    bigram: float,
    by_stage: Sequence[StageBytes],
    measured: MeasuredBytes,
    stage: int,
    ranks: int,
) -> None:
    """Write the picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    draw_losses(left, records, bigram=bigram)
    draw_memory(right, by_stage, measured=measured, stage=stage, ranks=ranks)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
