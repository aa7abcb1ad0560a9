"""torch DistributedDataParallel with its defaults. bf16 is autocast over fp32 parameters, reduced in fp32."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.engines.torch_engine import TorchEngine, autocast_dtype, rendezvous
from benchmarks.job import Job

__all__ = ["build", "rendezvous"]


def build(job: Job, model: nn.Module, device: torch.device) -> TorchEngine:
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model.to(device), device_ids=devices)
    return TorchEngine(wrapped, job, device, autocast=autocast_dtype(job))
