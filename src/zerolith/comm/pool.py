"""Flat scratch tensors that are used again and again: fresh pages cost more than the copy into them."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BYTES = 64 * 2**20  # larger ones would sit beside the activations, where a step's peak is


class Pool:
    """Free flat tensors by (size, dtype, device). Contents are undefined; at most `keep` of a kind are kept."""

    def __init__(self, *, keep: int = 2) -> None:
        self.keep = keep
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A (numel,) tensor with undefined contents."""
        free = self._free.get((numel, dtype, device))
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Hand `tensor` back; the caller must not use it any more."""
        free = self._free.setdefault((tensor.numel(), tensor.dtype, tensor.device), [])
        if len(free) < self.keep and tensor.nbytes <= KEPT_BYTES:
            free.append(tensor)

    def clear(self) -> None:
        """Drop every free tensor."""
        self._free.clear()
