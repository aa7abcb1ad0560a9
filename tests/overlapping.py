"""Engines whose updates run beside forward or backward, and what they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zerolith
from models import make_gpt, token_batches, zero_config
from plain import world_size

DATA = token_batches(6, 8)
PATIENCE_S = 30.0


def config_for(
    overlap: str | None, folder: Path, *, stage: int = 3, device: str = "cpu", **more: Any
) -> dict[str, Any]:
    """Two micro-batches to a step, units of several sections, a learning rate that moves."""
    offload = {"device": device, "overlap": overlap, **({"nvme_path": str(folder)} if device == "nvme" else {})}
    zero = {"offload_optimizer": offload, "reduce_bucket_size": 4000}
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size() // 2,
        "gradient_accumulation_steps": 2,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}},
    }
    return zero_config(stage, zero_optimization=zero, **{**config, **more})


def start(overlap: str | None, folder: Path, **more: Any) -> Any:
    """An engine around a small GPT."""
    return zerolith.initialize(model=make_gpt(), config=config_for(overlap, folder, **more))[0]
