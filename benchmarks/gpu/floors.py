"""What the machine can do at best: both directions of the bus, host memory, matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

ROUNDS = 7


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, done when the device is."""
    samples = []
    for _ in range(ROUNDS + 1):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        samples.append(time.perf_counter() - begin)
    return median(samples[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, *, mib: int = 1024, width: int = 8192) -> dict[str, float]:
    """GB/s and TFLOP/s. The triad is a = b + s c over three arrays of `mib` each, 12 bytes moved per element."""
    numel = mib * 2**20 // 4
    host = torch.zeros(numel, pin_memory=device.type == "cuda")
    there = torch.zeros(numel, device=device)
    b, c = torch.ones(numel), torch.ones(numel)
    x, y = (torch.ones(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))

    def copied(target: Tensor, source: Tensor) -> float:
        return 4 * numel / seconds(lambda: target.copy_(source, non_blocking=True), device) / 1e9

    return {
        "host_to_device_gb_per_s": copied(there, host),
        "device_to_host_gb_per_s": copied(host, there),
        "dram_triad_gb_per_s": 12
        * numel
        / seconds(lambda: torch.add(b, c, alpha=3.0, out=host), torch.device("cpu"))
        / 1e9,
        "bf16_gemm_tflop_per_s": 2 * width**3 / seconds(lambda: x @ y, device) / 1e12,
    }
