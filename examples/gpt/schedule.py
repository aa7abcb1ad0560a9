"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP_FRACTION = 0.05  # of all steps
FINAL_FACTOR = 0.05  # of the peak learning rate


def learning_rate_factor(step: int, *, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_FACTOR; `step` counts from 0."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * (1 + math.cos(math.pi * progress)) / 2


def schedule(num_steps: int) -> Callable[[Optimizer], LambdaLR]:
    """What `zerolith.initialize` takes as `lr_scheduler`: a function of the optimizer that it builds."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps=num_steps))
