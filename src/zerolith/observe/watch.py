"""What each optimizer step was like, for the monitors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zerolith.comm import Comm
from zerolith.memory import resident_bytes
from zerolith.observe.monitors import Monitor


class Watch:
    """Collects losses, tokens and time between steps, and tells the monitors on rank 0; without any it does nothing.

    `make` opens the monitors; it is called on rank 0 alone.
    """

    def __init__(self, comm: Comm, make: Callable[[], Sequence[Monitor]], *, enabled: bool) -> None:
        self._comm = comm
        self.enabled = enabled
        self._monitors = list(make()) if enabled and comm.rank == 0 else []
        self._losses: list[Tensor] = []
        self._tokens = 0
        self._last = time.perf_counter()

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
        if self.enabled:
            self._losses.append(loss.detach().float().reshape(()) * weight)

    def stepped(self, numbers: Mapping[str, float], *, samples: int, new_samples: int) -> None:
        """Write down a step. Collective over all ranks where there are monitors."""
        if not self.enabled:
            return
        total = torch.stack(self._losses).sum().item() if self._losses else 0.0
        loss, count, tokens = self._comm.sum([total, len(self._losses), self._tokens], name="monitors")
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._losses.clear()
        self._tokens = 0
        found = {"train_loss": loss / count} if count else {}
        found |= {**numbers, "samples_per_second": new_samples / seconds, "memory_mb": _memory_bytes(self._comm) / 1e6}
        if tokens:
            found["tokens_per_second"] = tokens / seconds
        for monitor in self._monitors:
            monitor.write({f"Train/Samples/{name}": value for name, value in found.items()}, samples)

    def remove(self) -> None:
        """Close what was opened."""
        for monitor in self._monitors:
            monitor.close()
        self._monitors.clear()


def _memory_bytes(comm: Comm) -> int:
    """Most that this rank's device has held, or what the process holds on a CPU."""
    return torch.cuda.max_memory_allocated(comm.device) if comm.device.type == "cuda" else resident_bytes()
