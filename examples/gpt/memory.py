"""Bytes per rank: what the ZeRO formulas say for a model, and what a process has used at most."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import torch

STAGES = (0, 1, 2, 3)
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT_BYTES = 4  # gradients add up in fp32
MOMENT_BYTES = 8  # Adam keeps two fp32 moments
MASTER_BYTES = {"fp32": 0, "bf16": 4, "fp16": 4}  # in fp32 the weights are their own master


class StageBytes(NamedTuple):
    """Model state of one rank in bytes."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All model state."""
        return sum(self)


def bytes_at_stage(stage: int, *, num_parameters: int, ranks: int, precision: str) -> StageBytes:
    """A rank's model state when backward ends: stage 1 shards optimizer states, 2 gradients, 3 parameters too."""
    optimizer = MOMENT_BYTES + MASTER_BYTES[precision]
    return StageBytes(
        parameters=COMPUTE_BYTES[precision] * num_parameters / (ranks if stage >= 3 else 1),
        gradients=GRADIENT_BYTES * num_parameters / (ranks if stage >= 2 else 1),
        optimizer=optimizer * num_parameters / (ranks if stage >= 1 else 1),
    )


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held: device memory on CUDA, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
