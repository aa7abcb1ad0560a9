"""The one picture of a run: its losses, and the memory of each ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # a file, whatever display there is

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gpt.memory import STAGES, StageBytes
from gpt.records import MeasuredBytes, StepRecord

MIB = 2**20
BAR_WIDTH = 0.4
COLOURS = {"parameters": "#4477aa", "gradients": "#ee8866", "optimizer": "#228833"}


class Memory(NamedTuple):
    """What the right half shows."""

    by_stage: Sequence[StageBytes]  # by the formulas, stages 0 to 3
    measured: MeasuredBytes
    stage: int  # that was measured
    ranks: int


def draw_losses(axes: Axes, records: Sequence[StepRecord], *, bigram_loss: float) -> None:
    """Training and validation loss by step, with the baseline as a line."""
    training = [(record.step, record.loss) for record in records if record.loss is not None]
    validation = [(record.step, record.val_loss) for record in records if record.val_loss is not None]
    label = f"validation: {validation[-1][1]:.3f} at the end"
    axes.plot(*zip(*training, strict=True), color="#4477aa", linewidth=1.2, label="training")
    axes.plot(*zip(*validation, strict=True), "o", color="#ee8866", markersize=5, label=label)
    axes.axhline(bigram_loss, color="#666666", linestyle="--", linewidth=1, label=f"bigram model: {bigram_loss:.3f}")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats per byte", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_memory(axes: Axes, memory: Memory) -> None:
    """Model state per rank at each stage by the formulas, and this run's beside its stage."""
    offset = BAR_WIDTH / 2
    for stage, planned in zip(STAGES, memory.by_stage, strict=True):
        _stack(axes, stage - offset, planned, label=f"{planned.total / MIB:.1f}", hatch="")
    total = sum(memory.measured) / MIB
    _stack(axes, memory.stage + offset, memory.measured, label=f"{total:.1f}", hatch="//")
    handles = [Patch(color=colour) for colour in COLOURS.values()]
    handles.append(Patch(facecolor="#999999", edgecolor="white", hatch="//"))
    axes.legend(handles, ["parameters", "gradients", "optimizer states", "measured in this run"])
    axes.set_xticks(STAGES, [f"stage {stage}" for stage in STAGES])
    axes.set(title=f"Model state per rank on {memory.ranks} ranks, by formula", ylabel="MiB")
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _stack(axes: Axes, x: float, heights: StageBytes | MeasuredBytes, *, label: str, hatch: str) -> None:
    bottom = 0.0
    for kind, colour in COLOURS.items():
        height = getattr(heights, kind) / MIB
        axes.bar(x, height, BAR_WIDTH, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        bottom += height
    axes.text(x, bottom, label, ha="center", va="bottom")


def draw_run(path: Path, records: Sequence[StepRecord], memory: Memory, *, title: str, bigram_loss: float) -> None:
    """Write the picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    draw_losses(left, records, bigram_loss=bigram_loss)
    draw_memory(right, memory)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
