"""What one rank saves and loads: the state of a model, by a contender. No torch: the driver reads it too."""

from __future__ import annotations

import json
from dataclasses import dataclass

from benchmarks.checkpoint.contenders import CONTENDERS
from benchmarks.job import SIZES as TRAINED_SIZES, Job, Shape

SIZES = {
    **TRAINED_SIZES,
    "1b": Shape(layers=18, width=2048, heads=16, vocab=50304, positions=1024),
}
STATE_BYTES = 12  # per parameter: weight, exp_avg and exp_avg_sq in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreJob(Job):
    """One contender's part of a run; equal on every rank. `engine` says which interpreter it needs."""

    contender: str
    micro_batch: int = 1
    seq: int = 16

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; choose one of {', '.join(SIZES)}.")
        if self.dtype != "fp32":
            raise ValueError(f"dtype {self.dtype!r}: states are compared in fp32 only.")

    @property
    def shape(self) -> Shape:
        return SIZES[self.size]

    @property
    def num_params(self) -> int:
        return num_params(self.shape)

    @property
    def state_bytes(self) -> int:
        """Of all ranks together, each number once."""
        return STATE_BYTES * self.num_params

    @staticmethod
    def of(contender: str, size: str) -> StoreJob:
        engine = CONTENDERS[contender].engine
        return StoreJob(engine=engine, size=size, dtype="fp32", device="cpu", contender=contender)

    @staticmethod
    def from_json(text: str) -> StoreJob:
        return StoreJob(**json.loads(text))


def num_params(shape: Shape) -> int:
    """Of a GPT of this shape, the tied embedding once."""
    width = shape.width
    matrices = 12 * width * width  # of a block: qkv, out, up, down
    vectors = 13 * width  # their biases and two norms
    return shape.layers * (matrices + vectors) + (shape.vocab + shape.positions) * width + 2 * width
