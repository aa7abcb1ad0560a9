"""What DeepSpeed and zerolith share: the JSON config and the engine's three calls."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.job import BETAS, EPS, WEIGHT_DECAY, Job

NEVER = 1_000_000_000  # steps between progress lines


class JsonEngine:
    """An engine made by `initialize(model=..., config=...)`."""

    # Any: either library may be missing from the interpreter that checks the types.
    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.engine(x, y)
        return loss

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()


def config(job: Job, *, stage: int) -> dict[str, object]:
    """The config for both. Gradient clipping is off; what is not named has the library's default."""
    adamw = {"lr": job.lr, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": job.dtype == "bf16"},
        "steps_per_print": NEVER,
    }
