"""zerolith, stages 0 to 3."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from benchmarks.engines.json_engine import JsonEngine, config
from benchmarks.job import Job


def rendezvous(device: torch.device) -> None:
    """Collective."""
    importlib.import_module("zerolith").init_distributed()


def build(job: Job, model: nn.Module, device: torch.device, *, stage: int) -> JsonEngine:
    """Collective."""
    zerolith = importlib.import_module("zerolith")
    engine, *_ = zerolith.initialize(model=model.to(device), config=config(job, stage=stage))
    return JsonEngine(engine)
