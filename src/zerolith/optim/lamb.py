"""LAMB: Adam whose step is scaled, tensor by tensor, to the size of the weights (You et al., arXiv:1904.00962)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerolith.optim.closure import evaluated


class Lamb(Optimizer):
    """u = m^ / (sqrt(v^) + eps) + weight_decay p;  p -= lr clamp(|p| / |u|, min_coeff, max_coeff) u.

    m^ and v^ are Adam's moments, corrected for their start at zero unless `bias_correction` is false. Where |p| or
    |u| is zero the factor is 1. State: step, exp_avg, exp_avg_sq. Norms need whole tensors, so their owners step them.
    """

    granularity = "tensor"

    def __init__(
        self,
        params: Any,  # tensors, named tensors or group dicts
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        bias_correction: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative, betas {betas} must lie "
                "in [0, 1)"
            )
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(f"min_coeff {min_coeff} and max_coeff {max_coeff} must be 0 <= min_coeff <= max_coeff")
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        options |= {"max_coeff": max_coeff, "min_coeff": min_coeff, "bias_correction": bias_correction}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_tensor(param, param.grad, group)
        return loss

    def _step_tensor(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:  # torch's param group
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        first, second = group["betas"]
        average, square = state["exp_avg"], state["exp_avg_sq"]
        average.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        corrects, step = group["bias_correction"], state["step"].item()
        root = (square / (1 - second**step if corrects else 1.0)).sqrt_().add_(group["eps"])
        update = (average / (1 - first**step if corrects else 1.0)).div_(root)
        if group["weight_decay"]:
            update.add_(param, alpha=group["weight_decay"])
        sizes = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
        ratio = (sizes[0] / sizes[1]).clamp_(group["min_coeff"], group["max_coeff"])
        param.sub_(update * torch.where(sizes[0] * sizes[1] > 0, ratio, 1.0) * group["lr"])
