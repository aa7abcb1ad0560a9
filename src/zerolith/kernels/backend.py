"""Who does the work: the compiled library on the CPU, Triton on CUDA, torch operations everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zerolith.errors import UsageError
from zerolith.kernels import native, reference
from zerolith.kernels.arrays import Arrays
from zerolith.kernels.recipe import Recipe
from zerolith.layout import BLOCK

logger = logging.getLogger("zerolith")


class Backend(Protocol):
    """One implementation; all have the same results. Arguments are checked already."""

    def update(self, recipe: Recipe, arrays: Arrays, *, threads: int) -> None:
        """One step on whole arrays."""

    def square_sums(self, values: Tensor, blocks: Tensor, *, threads: int) -> None:
        """The sums of squares of the blocks of `values`."""

    def add(self, target: Tensor, terms: Sequence[Tensor], blocks: Tensor | None, *, fresh: bool, threads: int) -> None:
        """The sum of `terms`, or of `target` and them, to `target`; the square sums of its blocks to `blocks`."""

    def split(self, master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
        """Write both halves of `master`."""

    def join(self, master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
        """Write `master` from both halves."""


def backend_for(device: torch.device) -> Backend:
    """The fastest there is."""
    if device.type == "cpu":
        return native.library() or reference
    return (triton_on(device) if device.type == "cuda" else None) or reference


def num_threads(threads: int | None) -> int:
    """As asked for, or as many as torch uses."""
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"threads {threads}: at least the caller's own is needed")
    return threads


@functools.cache
def triton_on(device: torch.device) -> Backend | None:
    """Triton's kernels if they run there, which is tried once: their first launch needs a C compiler."""
    # Not on AMD's GPUs: whether its roots and divisions round correctly there has not been tested.
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return None
    try:
        from zerolith.kernels import triton_kernels

        ones = torch.ones(BLOCK, device=device)
        triton_kernels.add(torch.zeros_like(ones), [ones], None, fresh=True, threads=1)
    except Exception as error:  # of many kinds: no compiler, no headers, a driver that is too old
        logger.warning(
            "Triton's kernels do not run here, so torch's operations do the work, with the same bits: %s", error
        )
        return None
    return triton_kernels
