"""What fits on a device, and what is asked of CUDA to know it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from zerolith.memory.room import CudaGauge, DeviceMemory, gauge_of, how_many_fit

BYTES = st.integers(0, 10**12)


@given(sizes=st.lists(BYTES, max_size=20), total=BYTES, free=BYTES, rise=BYTES, reserve=BYTES)
def test_as_many_fit_as_leave_the_reserve_at_the_peak(
    sizes: list[int], total: int, free: int, rise: int, reserve: int
) -> None:
    count = how_many_fit(sizes, DeviceMemory(total, free, rise), reserve=reserve)
    assert 0 <= count <= len(sizes)
    assert not count or free - rise - sum(sizes[:count]) >= reserve
    assert count == len(sizes) or free - rise - sum(sizes[: count + 1]) < reserve
    assert how_many_fit(sizes, DeviceMemory(total, free + 1000, rise), reserve=reserve) >= count
    assert how_many_fit(sizes, DeviceMemory(total, free, rise + 1000), reserve=reserve) <= count


def test_memory_that_the_allocator_keeps_is_free_and_each_peak_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    calls = []
    numbers = {"mem_get_info": (30, 100), "memory_allocated": 40, "max_memory_allocated": 55, "memory_reserved": 48}
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: calls.append((name, *args)))
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda on, value=value: value if on == device else None)
    gauge = gauge_of(device)
    assert isinstance(gauge, CudaGauge)
    assert calls == [("reset_peak_memory_stats", device)], "what was before is not a step's"
    assert gauge.look() == DeviceMemory(total=100, free=38, rise=15)
    assert calls[1:] == [("empty_cache",), ("reset_peak_memory_stats", device)]


def test_the_host_is_not_looked_at() -> None:
    assert gauge_of(torch.device("cpu")) is None
