"""What a run tells its reader: plain values, the same whoever writes them down."""

from __future__ import annotations

from typing import NamedTuple


class StepRecord(NamedTuple):
    """The state of training after a logged step; losses are in nats per byte."""

    step: int
    loss: float | None  # mean since the last record, over all ranks; None before the first step
    val_loss: float | None  # None where no evaluation was due
    learning_rate: float
    grad_norm: float | None
    tokens_per_s: float | None  # over all ranks, evaluation not counted
    peak_bytes: int  # of this rank's process
    skipped_steps: int
    seconds: float  # since the start


class Outcome(NamedTuple):
    """How training ended."""

    steps: int
    val_loss: float
    tokens_per_s: float
    out_of_time: bool  # stopped by --max-minutes before the last step


class MeasuredBytes(NamedTuple):
    """What the engine says that it keeps on this rank between steps."""

    parameters: int
    gradients: int
    optimizer: int
