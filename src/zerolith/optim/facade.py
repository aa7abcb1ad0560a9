"""The optimizer that `initialize` returns: the client's groups and state, and a step that is the engine's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from zerolith.errors import UsageError


class ZeroOptimizer(Optimizer):
    """Stands for `optimizer`, the client's or configured one, whose groups and state it shares.

    `step()` is the engine's step, `zero_grad()` the engine's. Schedulers may be built on it or on `optimizer`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        step: Callable[[], None],
        zero_grad: Callable[[], None],
        settle: Callable[[], None],  # waits for updates that run behind
        all_shown: Callable[[], AbstractContextManager[None]],  # in which `optimizer` has all tensors and states
    ) -> None:
        # Not super().__init__: groups and state are the client's own objects and stay in its hands.
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self._step = step
        self._zero_grad = zero_grad
        self._settle = settle
        self._all_shown = all_shown
        self.overflow = False  # whether the last step was skipped because gradients were not finite
        self.loss_scale = 1.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute in torch
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # a defaultdict attribute in torch
        self._settle()
        return self.optimizer.state

    @property
    def cur_scale(self) -> float:
        return self.loss_scale

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures are refused, not called
        """One engine step. Collective."""
        if closure is not None:
            raise UsageError("step() takes no closure: run engine.backward(loss) first, then step()")
        self._step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what has been accumulated since the last step. step() does so by itself."""
        self._zero_grad()

    def stepped(self, *, skipped: bool, loss_scale: float) -> None:
        """Learn how the engine's step went."""
        self.overflow, self.loss_scale = skipped, loss_scale
        # Where a scheduler looks for whether it comes after a step, as torch wants it to; ours may not be step()'s.
        for optimizer in (self, self.optimizer):
            vars(optimizer)["_opt_called"] = True

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, in torch's form. Raises UsageError if states are on disk."""
        self._settle()
        with self._all_shown():
            return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave on the same rank at the same world size."""
        self._settle()
        with self._all_shown():
            self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise UsageError("parameter groups are fixed once initialize has sharded them; add the group before it")

    def __repr__(self) -> str:
        return f"ZeroOptimizer({self.optimizer!r})"
