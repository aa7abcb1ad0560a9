"""What no engine can be much faster than: a rank that exchanges nothing and steps its share of the optimizer.

The model has the dtype of the products, without autocast, and never changes: what is stepped is a flat fp32 tensor of
1/N of its elements, which stands for this rank's shard of the master weights.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from benchmarks.engines.plain import rendezvous
from benchmarks.engines.torch_engine import TorchEngine, autocast_dtype
from benchmarks.job import Job

__all__ = ["build", "rendezvous"]


class Floor(TorchEngine):
    """Gradients are made and dropped; the optimizer steps `shard`."""

    def __init__(self, model: nn.Module, job: Job, device: torch.device) -> None:
        numel = sum(param.numel() for param in model.parameters()) // int(os.environ["WORLD_SIZE"])
        self.shard = nn.Parameter(torch.zeros(numel, device=device))
        self.shard.grad = torch.zeros_like(self.shard)
        super().__init__(model, job, device, autocast=None, stepped=[self.shard])

    def step(self) -> None:
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def build(job: Job, model: nn.Module, device: torch.device) -> Floor:
    return Floor(model.to(device, autocast_dtype(job)), job, device)
