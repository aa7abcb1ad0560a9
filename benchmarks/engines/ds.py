"""DeepSpeed, stages 0 to 3, with its own AdamW kernel."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from benchmarks.engines.json_engine import JsonEngine, config
from benchmarks.engines.torch_engine import BACKENDS
from benchmarks.job import Job


def rendezvous(device: torch.device) -> None:
    """Collective. On CPU its first call ever compiles the shared-memory operator, for a minute or more."""
    importlib.import_module("deepspeed").init_distributed(dist_backend=BACKENDS[device.type])


def build(job: Job, model: nn.Module, device: torch.device, *, stage: int) -> JsonEngine:
    """Collective. Its first call ever compiles FusedAdam, for a minute or more."""
    deepspeed = importlib.import_module("deepspeed")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(job, stage=stage))
    return JsonEngine(engine)
