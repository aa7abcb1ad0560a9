"""What each optimizer step was like, for the log and the monitors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zerolith.comm import Comm
from zerolith.memory import resident_bytes
from zerolith.observe.logs import Logs, StepNumbers
from zerolith.observe.monitors import Monitor

logger = logging.getLogger("zerolith")


class Watch:
    """Collects losses, tokens and time between steps, and tells the log and the monitors on rank 0.

    `make` opens the monitors; it is called on rank 0 alone. Only where there are monitors something is sent.
    """

    def __init__(self, comm: Comm, logs: Logs, make: Callable[[], Sequence[Monitor]], *, enabled: bool) -> None:
        self._comm = comm
        self._logs = logs
        self.enabled = enabled
        self._monitors = list(make()) if enabled and comm.rank == 0 else []
        self._losses: list[Tensor] = []
        self._weight = 0.0  # of the losses, in sum
        self._tokens = 0
        self._last = time.perf_counter()
        is_read_aside = logs.shows_loss and not enabled and comm.device.type == "cuda"
        self._aside = torch.cuda.Stream(comm.device) if is_read_aside else None
        self._computed = torch.cuda.Event() if is_read_aside else None  # the last loss

    def saw_inputs(self, inputs: Any) -> None:
        """Count the tokens of a forward: the elements of its first tensor of integers."""
        if self.enabled and torch.is_grad_enabled():
            leaves = torch.utils._pytree.tree_leaves(inputs)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            integers = (leaf for leaf in tensors if not leaf.is_floating_point() and not leaf.is_complex())
            first = next(integers, None)
            self._tokens += first.numel() if first is not None else 0

    def saw_loss(self, loss: Tensor, *, weight: float) -> None:
        """Remember a micro-batch's loss times its weight. Does not wait for the device."""
        if self.enabled or self._logs.shows_loss:
            self._losses.append(loss.detach().float().reshape(()) * weight)
            self._weight += weight
            if self._computed is not None:
                self._computed.record()

    def stepped(self, numbers: StepNumbers, *, new_samples: int) -> None:
        """Log a step where it is due, and write it down. Collective over all ranks where there are monitors."""
        loss, tokens = self._over_ranks() if self.enabled else (self._own_loss(numbers.step), None)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._losses.clear()
        self._weight, self._tokens = 0.0, 0
        found = {
            "loss": loss,
            "samples_per_second": new_samples / seconds,
            "tokens_per_second": tokens / seconds if tokens else None,
            "memory_mb": _memory_bytes(self._comm) / 1e6 if self.enabled else None,
        }
        known = {name: value for name, value in found.items() if value is not None}
        self._logs.stepped(numbers, known)
        if self._monitors:
            self._write(numbers, known)

    def remove(self) -> None:
        """Close what was opened."""
        for monitor in self._monitors:
            monitor.close()
        self._monitors.clear()
        self._logs.remove()

    def _write(self, numbers: StepNumbers, found: Mapping[str, float]) -> None:
        written = {"lr": numbers.lr[0], "grad_norm": numbers.grad_norm, "loss_scale": numbers.loss_scale}
        written["skipped_steps"] = numbers.skipped_steps
        written |= {"train_loss" if name == "loss" else name: value for name, value in found.items()}
        for monitor in list(self._monitors):
            try:
                monitor.write({f"Train/Samples/{name}": value for name, value in written.items()}, numbers.samples)
            except OSError as error:  # training is worth more than its record; other ranks do not know of this
                self._monitors.remove(monitor)
                logger.warning("%s writes no more: %s", type(monitor).__name__, error)

    def _over_ranks(self) -> tuple[float | None, float]:
        """Mean of all losses since the last step, if there were any, and the number of tokens. Collective."""
        total = self._sum() if self._losses else 0.0
        loss, count, tokens = self._comm.sum([total, len(self._losses), self._tokens], name="monitors")
        return loss / count if count else None, tokens

    def _own_loss(self, step: int) -> float | None:
        """Mean of this rank's losses since the last step, for the log alone."""
        return self._sum() / self._weight if self._weight and self._logs.is_due(step) else None

    def _sum(self) -> float:
        """Of this rank's losses. Read aside, it waits for them alone, not for what was queued after them."""
        if self._aside is None or self._computed is None:
            return torch.stack(self._losses).sum().item()
        with torch.cuda.stream(self._aside):
            self._aside.wait_event(self._computed)
            return torch.stack(self._losses).sum().item()


def _memory_bytes(comm: Comm) -> int:
    """Most that this rank's device has held, or what the process holds on a CPU."""
    return torch.cuda.max_memory_allocated(comm.device) if comm.device.type == "cuda" else resident_bytes()
