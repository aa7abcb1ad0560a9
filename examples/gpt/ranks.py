"""The few words that ranks exchange besides what the engine does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sums, equal on every rank. Collective."""
    return _reduced(values, device, dist.ReduceOp.SUM)


def max_over_ranks(value: float, device: torch.device) -> float:
    """The greatest of all ranks' values. Collective."""
    return _reduced([value], device, dist.ReduceOp.MAX)[0]


def _reduced(values: Sequence[float], device: torch.device, operation: dist.ReduceOp.RedOpType) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=operation)
    result: list[float] = tensor.tolist()
    return result
