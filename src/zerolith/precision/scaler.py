"""The loss scale of fp16: static or dynamic. Plain arithmetic; no tensors, no processes.

Dynamic rule, with DeepSpeed's parameters: an overflow uses up one unit of hysteresis, and once none is left halves
the scale; `window` good steps in a row double it. A step is unscaled with the scale that its backward used, and
only then is the scale changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zerolith.errors import ScaleError

FACTOR = 2.0


@dataclass(kw_only=True)
class LossScaler:
    """Owner of the loss scale. `dynamic=False` never changes it."""

    scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0
    good_steps: int = 0  # since the last change or overflow
    hysteresis_left: int = 0

    def __post_init__(self) -> None:
        self.hysteresis_left = self.hysteresis_left or self.hysteresis

    def update(self, *, overflow: bool, cause: str = "") -> None:
        """Account for one step. Raises ScaleError if the scale would have to go below its minimum."""
        if not self.dynamic:
            return
        if overflow:
            self._back_off(cause)
            return
        self.good_steps += 1
        if self.consecutive_hysteresis:
            self.hysteresis_left = self.hysteresis
        if self.good_steps >= self.window:
            self.scale *= FACTOR
            self.good_steps = 0
            self.hysteresis_left = self.hysteresis

    def _back_off(self, cause: str) -> None:
        self.good_steps = 0
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
            return
        if self.scale <= self.minimum:
            where = f", first in {cause}" if cause else ""
            raise ScaleError(
                f"the loss scale is at its minimum of {self.minimum:g} and gradients still overflow{where}: the model "
                "itself makes inf or NaN. Look at that parameter's inputs, lower the learning rate, or use bf16."
            )
        self.scale = max(self.scale / FACTOR, self.minimum)

    def state_dict(self) -> dict[str, float | int | bool]:
        return asdict(self)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the scale of an earlier run, by the rule of this one; not if either has a fixed scale."""
        if self.dynamic and state["dynamic"]:
            self.scale = max(state["scale"], self.minimum)
            self.good_steps = state["good_steps"]
            self.hysteresis_left = min(state["hysteresis_left"], self.hysteresis)

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
        vars(self).update(state)
