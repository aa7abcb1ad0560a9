"""Counting micro-batches in backwards, so that both habits train right: step() after each, or only at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from zerolith.errors import UsageError

logger = logging.getLogger("zerolith")
MANY_DROPS = 3  # in a row, which is no accident


class MicroSteps:
    """Where a run is within its gradient accumulation. Plain integers.

    Unless `managed`, every step() updates and nobody knows beforehand which backward is the last.
    """

    def __init__(self, per_step: int, *, managed: bool = True) -> None:
        self.per_step = per_step
        self.managed = managed
        self.total = 0  # backwards so far
        self._drops = 0  # accumulations dropped since the last step
        self._origin = 0  # of them, before the accumulation was counted anew
        self.since_step = 0  # backwards since the last optimizer step
        self.after_backward = False  # a backward is over, and neither step() nor a forward nor another has begun
        self.asked = False  # step() has been called since the last backward
        self.manual: bool | None = None  # set by set_gradient_accumulation_boundary

    def is_boundary(self) -> bool:
        """Whether the micro-batch at hand, or the one just done, completes an optimizer step."""
        return not self.managed or self._completes(self.total if self.after_backward else self.total + 1)

    def is_last(self) -> bool:
        """Whether the backward that begins is known to be the step's last."""
        return self.managed and self.is_boundary()

    def count_anew(self, per_step: int) -> None:
        """From now on `per_step` micro-batches make a step. Raises UsageError in the middle of one."""
        if self.since_step:
            raise UsageError(
                f"{self.since_step} micro-batches wait for their step(); change the batch size after it, or drop them "
                "with zero_grad()"
            )
        self.per_step, self._origin = per_step, self.total

    def forward_begun(self) -> None:
        self.after_backward = False

    backward_begun = forward_begun

    def backward_done(self) -> None:
        self.total += 1
        self.since_step += 1
        self.after_backward = True
        self.asked = False

    def take_step(self) -> bool:
        """Whether step() must update now. Raises UsageError if there is nothing to step with."""
        # Forwards may have run since the last backward; step() is about what that one left.
        due = not self.managed or self._completes(self.total)
        if self.since_step == 0 or (self.asked and not self.manual):
            raise UsageError("step() without a backward since the last step(); call engine.backward(loss) first")
        self.asked = True
        self.after_backward = False
        if due:
            self.since_step = self._drops = 0
        return due

    def drop(self) -> None:
        """Forget the micro-batches since the last step; the next one starts a new accumulation."""
        self._drops += 1
        if self._drops == MANY_DROPS:
            logger.warning(
                "zero_grad() has dropped %d unfinished accumulations of %d micro-batches and no step was taken: leave "
                "it out, step() does it by itself",
                self._drops,
                self.per_step,
            )
        self._origin = self.total
        self.since_step = 0
        self.after_backward = False

    def state_dict(self) -> dict[str, int | bool | None]:
        """Where the run is."""
        return {
            "per_step": self.per_step,
            "total": self.total,
            "origin": self._origin,
            "since_step": self.since_step,
            "after_backward": self.after_backward,
            "asked": self.asked,
            "manual": self.manual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; if a step takes another number of micro-batches now, at the same part.

        Raises UsageError, before anything changes, if that part is no whole number of micro-batches.
        """
        self.total, self.since_step = state["total"], self.resumed(state)
        is_same = state["per_step"] == self.per_step
        self._origin = state["origin"] if is_same and self.since_step else self.total - self.since_step
        self.after_backward, self.asked, self.manual = state["after_backward"], state["asked"], state["manual"]

    def resumed(self, state: Mapping[str, Any]) -> int:
        """Micro-batches since the last step, in this run's count. Raises UsageError if they are no whole number."""
        done, of = state["since_step"], state["per_step"]
        if done * self.per_step % of:
            raise UsageError(
                f"the checkpoint was saved after {done} of {of} micro-batches of a step, which is no whole number of "
                f"this run's {self.per_step}; resume with a gradient_accumulation_steps that {of} divides"
            )
        return int(done * self.per_step // of)

    def _completes(self, number: int) -> bool:
        return self.manual if self.manual is not None else (number - self._origin) % self.per_step == 0
