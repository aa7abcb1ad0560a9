"""How much of a device's memory nobody needs, not even where a training step needs most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class DeviceMemory(NamedTuple):
    """Bytes of a device, as one process sees them."""

    total: int
    free: int  # that the process can have now
    rise: int  # by which its tensors took more than now, at the peak since the look before


class Gauge(Protocol):
    """Who can tell."""

    def look(self) -> DeviceMemory:
        """What it is now; the peak begins anew."""
        ...


class CudaGauge:
    """Looks at a CUDA device by torch's statistics, whose peak begins anew with each look and when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> DeviceMemory:
        """What it is now; what the allocator keeps unused goes back to the driver, in one piece."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        used, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return DeviceMemory(total, free + torch.cuda.memory_reserved(self._device) - used, peak - used)


def gauge_of(device: torch.device) -> Gauge | None:
    """Who looks at `device`; None for the CPU, where the host's memory is the device's."""
    return CudaGauge(device) if device.type == "cuda" else None


def how_many_fit(sizes: Sequence[int], memory: DeviceMemory, *, reserve: int) -> int:
    """How many, from the first on, can come for good, with `reserve` bytes left at the peak of a step.

    sizes: bytes of each. One that does not fit ends it, whatever comes after it.
    """
    left = memory.free - memory.rise - reserve
    for number, size in enumerate(sizes):
        left -= size
        if left < 0:
            return number
    return len(sizes)
