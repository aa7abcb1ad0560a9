"""What torch lets `Optimizer.step` be given: a function that computes the loss again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What `closure` returns, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
