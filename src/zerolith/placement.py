"""In which memory states rest, as the config says. Everything that can fail is tried before anything is sharded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

from zerolith.comm import Comm, ranks_on_this_host
from zerolith.config import Config
from zerolith.config.zero import OffloadOptimizer, OffloadParam
from zerolith.errors import OffloadError
from zerolith.member import Member
from zerolith.memory import HostStore, StagedSwap, Store, SwapFile, memory_of_host
from zerolith.memory.host_store import copier_for
from zerolith.memory.lane import Copier
from zerolith.observe import STATES
from zerolith.optim import original
from zerolith.precision import Precision

logger = logging.getLogger("zerolith")
LEFT_SHARE = 0.1  # of a host's memory, which page-locked memory leaves to everybody else: it cannot be swapped out


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """None is the device itself, everywhere."""

    master_device: torch.device | None  # where masters and optimizer states are stepped
    copier: Copier | None  # how gradients get there, and weights back; None where nothing is far
    states: SwapFile | None  # where they rest
    weights: Store | None  # where shards of weights rest at stage 3


def make_placement(config: Config, device: torch.device, undo: ExitStack, *, trains: bool) -> Placement:
    """`undo` gives back what was made here. Raises OffloadError if a file cannot be made."""
    zero = config.zero_optimization
    is_offloaded = trains and zero.offload_optimizer.device != "none"
    return Placement(
        master_device=torch.device("cpu") if is_offloaded else None,
        copier=host_copier(device) if is_offloaded else None,
        states=_swap(zero.offload_optimizer, undo) if trains else None,
        weights=_weights_store(zero.offload_param, device, undo),
    )


def host_copier(device: torch.device) -> Copier | None:
    """How bytes move between a device and host memory; None where the host is the device."""
    return copier_for(device) if device.type != "cpu" else None


def check_room(
    config: Config, members: Sequence[Member], precision: Precision, optimizer: Optimizer | None, comm: Comm
) -> None:
    """That this host and its disks have room for what its ranks will offload, before anything is moved.

    Raises OffloadError if they cannot have it; says so if the host's memory is in use by others now.
    """
    zero = config.zero_optimization

    def of_this_host(sizes: Iterable[int]) -> float:
        return sum(sizes) / comm.size * ranks_on_this_host()

    kind = original(type(optimizer)).__name__ if optimizer is not None else ""
    numbers = 1 + STATES.get(kind, 1)  # of each trained element
    masters = zero.offload_optimizer.ratio * of_this_host(
        member.param.numel() * precision.master_dtype(member.param.dtype).itemsize
        for member in members
        if optimizer is not None and member.trained
    )
    weights = of_this_host(
        member.param.numel() * precision.compute_dtype(member.param.dtype).itemsize for member in members
    )
    in_memory = locked = 0.0
    if comm.device.type == "cuda":
        if zero.offload_optimizer.device != "none":
            in_memory = locked = masters  # gradients on their way before a step; weights after it are fewer
        locked += weights if zero.offload_param.device == "cpu" else 0.0
    for what, offload, needed in (
        ("states", zero.offload_optimizer, numbers * masters),
        ("weights", zero.offload_param, weights),
    ):
        if offload.device == "nvme":
            _check_disk(Path(offload.nvme_path or "").absolute(), what, needed)
        in_memory += needed if offload.device == "cpu" else 0.0
    _check_memory(in_memory, page_locked=locked)


def _check_disk(folder: Path, what: str, needed: float) -> None:
    try:
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free
    except OSError:
        return  # who makes the file there tells
    if needed > free:
        raise OffloadError(
            f"{folder}: {_gb(needed)} of {what} of this host's ranks are to go there, and {_gb(free)} are free; "
            "offload a smaller ratio, use more ranks, or choose a larger disk"
        )


def _check_memory(needed: float, *, page_locked: float) -> None:
    memory = memory_of_host()
    if memory is None:
        return
    if needed > memory[0]:
        raise OffloadError(
            f"{_gb(needed)} of this host's ranks are to be offloaded to its memory, which is {_gb(memory[0])}; offload "
            "a smaller ratio, use more hosts, or offload to nvme"
        )
    if page_locked > (1 - LEFT_SHARE) * memory[0]:
        raise OffloadError(
            f"{_gb(page_locked)} of weights and gradients of this host's ranks are to be page-locked in its memory, "
            f"which is {_gb(memory[0])}, and {LEFT_SHARE:.0%} of it must be left to everybody else; use more hosts, or "
            "offload weights to nvme"
        )
    if needed > memory[1]:
        message = "%s are to be offloaded to this host's memory, of which only %s are free"
        logger.warning(message, _gb(needed), _gb(memory[1]))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


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
