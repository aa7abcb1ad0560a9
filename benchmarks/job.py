"""What one rank trains: model shape, batch, precision, optimizer. No torch: the driver reads it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a GPT with one tied embedding."""

    layers: int
    width: int
    heads: int
    vocab: int
    positions: int


SIZES = {
    "tiny": Shape(layers=2, width=64, heads=2, vocab=512, positions=128),  # to try the harness, not to compare
    "25m": Shape(layers=6, width=512, heads=8, vocab=12288, positions=256),
    "125m": Shape(layers=12, width=768, heads=12, vocab=50304, positions=1024),
}
DTYPES = ("fp32", "bf16")
PRODUCTS = ("native", "fp32")

# Spelled out for every engine: their own defaults differ (torch decays by 0.01, DeepSpeed by 0).
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One engine's part of a run; equal on every rank."""

    engine: str
    size: str
    dtype: str
    device: str  # cpu or cuda
    micro_batch: int = 4  # sequences per rank and step
    seq: int = 128
    seed: int = 0
    lr: float = 5e-5
    products: str = "native"  # or fp32: how bf16 matrices are multiplied, see bf16_products

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; choose one of {', '.join(SIZES)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}.")
        if self.seq > self.shape.positions:
            raise ValueError(f"seq {self.seq} exceeds the {self.shape.positions} positions of {self.size!r}.")

    @property
    def shape(self) -> Shape:
        return SIZES[self.size]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        return Job(**json.loads(text))
