"""zerolith, stages 0 to 3, with masters and optimizer states in memory or on disk."""

from __future__ import annotations

import importlib
import tempfile

import torch
from torch import nn

from benchmarks.engines.json_engine import JsonEngine, config
from benchmarks.job import Job


def rendezvous(device: torch.device) -> None:
    """Collective."""
    importlib.import_module("zerolith").init_distributed()


def build(
    job: Job, model: nn.Module, device: torch.device, *, stage: int, disk: bool = False, overlaps: bool = True
) -> JsonEngine:
    """disk: states rest in a file in the folder for temporary files; `overlaps`: they are stepped behind forward.

    Collective.
    """
    zerolith = importlib.import_module("zerolith")
    offload = {"device": "nvme", "nvme_path": tempfile.gettempdir(), "overlap": "forward" if overlaps else "none"}
    settings = config(job, stage=stage)
    if disk:
        settings["zero_optimization"] = {"stage": stage, "offload_optimizer": offload}
    engine, *_ = zerolith.initialize(model=model.to(device), config=settings)
    return JsonEngine(engine)
