"""torch.optim's optimizers stepped by zerolith.kernels: one pass over memory, the same bits wherever the states are.

Options, states and state dicts are those of the torch class that each one is. What the kernels do not know (an option
such as amsgrad, masters that are not fp32) is stepped by torch's own code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerolith import kernels
from zerolith.optim import lion
from zerolith.optim.closure import evaluated

Group = Mapping[str, Any]  # a param group's options

NOT_KNOWN = ("amsgrad", "maximize", "differentiable", "capturable", "foreach", "fused")  # options, unless false or None


class OnePass(Optimizer, ABC):
    """What the classes below share; each is a torch optimizer, too."""

    granularity = "element"
    grad_factor: float = 1.0  # of all gradients, applied on the way
    outs: Mapping[Tensor, Tensor] = {}  # by stepped tensor: where its new value goes, rounded to the dtype there

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = evaluated(closure)
        pairs = [(group, param) for group in self.param_groups for param in group["params"] if param.grad is not None]
        done, left = [], []
        for group, param in pairs:
            if self.knows(param, group):
                extra = {"grad_factor": self.grad_factor, "out": self.outs.get(param)}
                self._update(param, param.grad.contiguous(), group, extra)
                done.append((param, param.grad))
            else:
                left.append(param)
        if left:
            self._step_left(left, done)
        return loss

    def knows(self, param: Tensor, group: Group) -> bool:
        """Whether the kernels step this one, and leave its gradient as it is."""
        return param.dtype is torch.float32 and not any(group.get(option) for option in NOT_KNOWN)

    @abstractmethod
    def _update(self, param: Tensor, grad: Tensor, group: Group, extra: dict[str, Any]) -> None:
        """Step one parameter; `extra` are the kernels' keywords that all of them take."""

    def _step_left(self, left: list[Tensor], done: list[tuple[Tensor, Tensor]]) -> None:
        for param, _ in done:
            param.grad = None
        for param in left:
            assert param.grad is not None, "only those with a gradient are stepped"
            param.grad.mul_(self.grad_factor)
        super().step()  # the torch class's
        for param in left:
            if param in self.outs:
                self.outs[param].copy_(param)
        for param, grad in done:
            param.grad = grad


class _AnyAdam(OnePass):
    def _update(self, param: Tensor, grad: Tensor, group: Group, extra: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        kernels.adamw(
            param.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            decoupled=isinstance(self, torch.optim.AdamW),
            **extra,
        )


class AdamW(_AnyAdam, torch.optim.AdamW):
    """torch.optim.AdamW."""


class Adam(_AnyAdam, torch.optim.Adam):
    """torch.optim.Adam, whose weight decay is part of the gradient."""


class Lion(OnePass, lion.Lion):
    """zerolith.optim.Lion."""

    def _update(self, param: Tensor, grad: Tensor, group: Group, extra: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        options = {"lr": float(group["lr"]), "betas": group["betas"], "weight_decay": group["weight_decay"]}
        kernels.lion(param.detach(), state["exp_avg"], grad, **options, **extra)


class Adagrad(OnePass, torch.optim.Adagrad):
    """torch.optim.Adagrad."""

    def _update(self, param: Tensor, grad: Tensor, group: Group, extra: dict[str, Any]) -> None:
        state = self.state[param]
        state["step"] += 1
        options = {name: group[name] for name in ("lr_decay", "weight_decay", "eps")}
        number = int(state["step"])
        kernels.adagrad(param.detach(), state["sum"], grad, lr=float(group["lr"]), step=number, **options, **extra)


class SGD(OnePass, torch.optim.SGD):
    """torch.optim.SGD."""

    def _update(self, param: Tensor, grad: Tensor, group: Group, extra: dict[str, Any]) -> None:
        options = {name: group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov")}
        buffer = self.state[param].get("momentum_buffer") if group["momentum"] else None
        is_first = buffer is None
        if is_first and group["momentum"]:
            buffer = self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        number = 1 if is_first else 2  # later steps are all alike
        kernels.sgd(param.detach(), buffer, grad, lr=float(group["lr"]), step=number, **options, **extra)


CLASSES: dict[str, type[OnePass]] = {each.__name__: each for each in (Adam, AdamW, Lion, Adagrad, SGD)}


def original(kind: type[Optimizer]) -> type[Optimizer]:
    """The class whose options and states `kind` has: of ours, the one that it steps."""
    kinds = (each for each in kind.__mro__ if issubclass(each, Optimizer) and not issubclass(each, OnePass))
    return next(kinds)
