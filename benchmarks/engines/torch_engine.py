"""What torch's engines share: rendezvous, AdamW and the step."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.job import BETAS, EPS, WEIGHT_DECAY, Job

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class TorchEngine:
    """Any module and any torch optimizer; autocast where a dtype is given."""

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        device: torch.device,
        *,
        autocast: torch.dtype | None,
        stepped: Iterable[nn.Parameter] | None = None,  # else those of the model
    ) -> None:
        self.model = model
        self.device = device
        self.autocast = autocast
        self.optimizer = AdamW(
            stepped or model.parameters(), lr=job.lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss: Tensor = self.model(x, y)
        return loss

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def rendezvous(device: torch.device) -> None:
    """Joins the default process group. Collective."""
    dist.init_process_group(
        BACKENDS[device.type], rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )


def autocast_dtype(job: Job) -> torch.dtype | None:
    return torch.bfloat16 if job.dtype == "bf16" else None
