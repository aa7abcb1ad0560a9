"""One process, no communication. bf16 is autocast over fp32 parameters."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.engines.torch_engine import TorchEngine, autocast_dtype
from benchmarks.job import Job


def rendezvous(device: torch.device) -> None:
    """Nobody to meet."""


def build(job: Job, model: nn.Module, device: torch.device) -> TorchEngine:
    return TorchEngine(model.to(device), job, device, autocast=autocast_dtype(job))
