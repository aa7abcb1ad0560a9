"""In which memory states rest, as the config says. Everything that can fail is tried before anything is sharded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from zerolith.config import Config
from zerolith.config.schema import OffloadOptimizer, OffloadParam
from zerolith.memory import HostStore, StagedSwap, Store, SwapFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """None is the device itself, everywhere."""

    master_device: torch.device | None  # where masters and optimizer states are stepped
    states: SwapFile | None  # where they rest
    weights: Store | None  # where shards of weights rest at stage 3


def make_placement(config: Config, device: torch.device, undo: ExitStack, *, trains: bool) -> Placement:
    """`undo` gives back what was made here. Raises OffloadError if a file cannot be made."""
    zero = config.zero_optimization
    is_offloaded = trains and zero.offload_optimizer.device != "none"
    return Placement(
        master_device=torch.device("cpu") if is_offloaded else None,
        states=_swap(zero.offload_optimizer, undo) if trains else None,
        weights=_weights_store(zero.offload_param, device, undo),
    )


def _weights_store(offload: OffloadParam, device: torch.device, undo: ExitStack) -> Store | None:
    swap = _swap(offload, undo)
    if swap is not None:
        return StagedSwap(swap, device) if device.type == "cuda" else swap
    return HostStore(device) if offload.device == "cpu" and device.type == "cuda" else None


def _swap(offload: OffloadOptimizer | OffloadParam, undo: ExitStack) -> SwapFile | None:
    if offload.device != "nvme":
        return None
    swap = SwapFile(Path(offload.nvme_path or "").absolute())
    undo.callback(swap.close)
    return swap
