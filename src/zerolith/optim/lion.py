"""Lion: the sign of an interpolated momentum (Chen et al., arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerolith.optim.closure import evaluated


class Lion(Optimizer):
    """u = sign(b1 m + (1 - b1) g);  p -= lr (u + weight_decay p);  m = b2 m + (1 - b2) g.

    Good rates are 3 to 10 times smaller than AdamW's, weight decay as many times larger. State: exp_avg.
    """

    granularity = "element"

    def __init__(
        self,
        params: Any,  # tensors, named tensors or group dicts
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr} and weight_decay {weight_decay} must not be negative, betas {betas} must lie in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = evaluated(closure)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:  # torch's param group
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        grads = [param.grad for param in params]
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
        averages = [self.state[param]["exp_avg"] for param in params]
        first, second = group["betas"]
        updates = torch._foreach_mul(averages, first)
        torch._foreach_add_(updates, grads, alpha=1 - first)
        torch._foreach_sign_(updates)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(params, updates)
        torch._foreach_lerp_(averages, grads, 1 - second)
