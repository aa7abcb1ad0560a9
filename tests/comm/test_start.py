"""Which GPU a rank takes, and which backend moves its tensors. No GPU and no group is needed to choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from zerolith.comm.communicator import backend_on
from zerolith.comm.start import init_distributed


@pytest.mark.parametrize(
    ("device_type", "config", "backend"),
    [
        ("cpu", "cpu:gloo", "gloo"),
        ("cuda", "cpu:gloo,cuda:nccl", "nccl"),  # also what torch calls "undefined"
        ("cpu", "cpu:gloo,cuda:nccl", "gloo"),
        ("cuda", "cuda:nccl", "nccl"),
        ("cuda", "nccl", "nccl"),
    ],
)
def test_the_backend_is_that_of_the_device(device_type: str, config: str, backend: str) -> None:
    assert backend_on(device_type, config) == backend


@pytest.mark.parametrize(
    ("local_rank", "current", "bound", "chosen"),
    [
        ("2", 0, None, 2),
        ("2", 1, None, 1),  # the caller has chosen
        (None, 3, None, 3),
        ("5", 0, None, 0),  # each rank sees one of the host's GPUs only
        ("2", 0, torch.device("cuda", 3), 3),
        (None, 0, torch.device("cuda", 1), 1),
    ],
)
def test_a_rank_takes_the_gpu_of_its_group_or_of_its_place_on_the_host(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, current: int, bound: torch.device | None, chosen: int
) -> None:
    device = [current]

    def choose(wanted: int | torch.device) -> None:
        device[0] = wanted if isinstance(wanted, int) else wanted.index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=bound)))
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    init_distributed()
    assert device == [chosen]
