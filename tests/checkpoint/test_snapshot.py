"""The copy from which a checkpoint is written behind the training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from zerolith.checkpoint import snapshot
from zerolith.checkpoint.content import Part
from zerolith.checkpoint.snapshot import Snapshot
from zerolith.errors import OffloadError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)


def parts_of(tensors: list[Tensor]) -> list[Part]:
    return [Part.whole(f"t{number}", tensor) for number, tensor in enumerate(tensors)]


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 70), st.sampled_from(DTYPES)), max_size=6), max_size=4))
def test_each_copy_is_what_was_there_and_stays_it(saves: list[list[tuple[int, torch.dtype]]]) -> None:
    taken = Snapshot()
    for save in saves:
        tensors = [torch.randint(0, 2, (numel,)).to(dtype) for numel, dtype in save]
        before = [tensor.clone() for tensor in tensors]
        copies = taken.take(parts_of(tensors))
        for tensor in tensors:
            tensor.zero_()
        assert [copy.name for copy in copies] == [f"t{number}" for number in range(len(save))]
        for copy, expected in zip(copies, before, strict=True):
            assert copy.data.dtype == expected.dtype
            assert torch.equal(copy.data, expected)


def test_memory_is_kept_for_the_next_copy_until_a_larger_one_comes() -> None:
    taken = Snapshot()
    first, smaller, larger = (taken.take(parts_of([torch.ones(n)]))[0].data.data_ptr() for n in (1000, 10, 10**6))
    assert first == smaller != larger


@pytest.fixture
def pinned_requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors of fp32 count as a device's; what is page-locked for them, in bytes."""
    requests: list[int] = []
    host_bytes = snapshot.host_bytes

    def noted(nbytes: int, *, pinned: bool) -> Tensor:
        if pinned:
            requests.append(nbytes)
        return host_bytes(nbytes, pinned=False)

    monkeypatch.setattr(snapshot, "host_bytes", noted)
    monkeypatch.setattr(snapshot, "is_far", lambda tensor: tensor.dtype is torch.float32)
    return requests


def test_only_what_is_on_a_device_is_page_locked_in_one_piece_of_its_size(pinned_requests: list[int]) -> None:
    taken = Snapshot()
    tensors = [torch.randn(1000), torch.arange(10**6), torch.randn(24), torch.randn(0)]
    copies = taken.take(parts_of(tensors))
    assert pinned_requests == [4032 + 128]  # 4000 and 96 bytes in whole cache lines
    assert all(torch.equal(copy.data, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    taken.take(parts_of(tensors[:2]))
    assert len(pinned_requests) == 1


def test_without_memory_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Snapshot()
    taken.take(parts_of([torch.ones(8)]))

    def refuse(nbytes: int, *, pinned: bool) -> Tensor:
        raise OffloadError("none")

    monkeypatch.setattr(snapshot, "host_bytes", refuse)
    with pytest.raises(OffloadError):
        taken.take(parts_of([torch.ones(10**6)]))
    assert not taken._memory
