"""Room for what is offloaded is looked for before anything is moved."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zerolith
from harness import run_ranks
from models import make_gpt, token_batches, train_on
from zerolith import placement
from zerolith.config import load_config
from zerolith.errors import OffloadError, ZerolithError
from zerolith.memory import memory_of_host
from zerolith.precision import Precision

NUMEL = sum(param.numel() for param in make_gpt().parameters())
Usage = namedtuple("Usage", "total used free")


def start(zero: dict[str, Any], **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        **more,
    }
    return zerolith.initialize(model=make_gpt(), config=config)[0]


def host_with(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(placement, "memory_of_host", lambda: (total, free))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_host_that_is_too_small_is_refused(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": ratio}}
    needed = int(ratio * 12 * NUMEL)
    host_with(monkeypatch, needed, needed)
    start(zero).destroy()
    host_with(monkeypatch, needed - 1, needed - 1)
    with pytest.raises(OffloadError, match=r"to be offloaded to its memory, which is .* smaller ratio"):
        start(zero)


def test_a_host_that_is_full_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    host_with(monkeypatch, 100 * NUMEL, 12 * NUMEL - 1)
    with caplog.at_level(logging.WARNING, logger="zerolith"):
        start({"stage": 2, "offload_optimizer": {"device": "cpu"}}).destroy()
    assert "of which only" in caplog.text


def test_states_and_weights_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    host_with(monkeypatch, 14 * NUMEL, 14 * NUMEL)
    start(zero).destroy()
    host_with(monkeypatch, 14 * NUMEL - 1, 14 * NUMEL)
    with pytest.raises(OffloadError, match="to be offloaded"):
        start(zero)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_that_are_page_locked_leave_a_tenth_of_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        {"train_batch_size": 1, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    )
    member = SimpleNamespace(param=torch.empty(9000, device="meta"), trained=True)
    comm = SimpleNamespace(size=1, device=torch.device(device))

    def check() -> None:
        placement.check_room(config, [member], Precision(), None, comm)

    host_with(monkeypatch, 40_000, 40_000)
    check()
    host_with(monkeypatch, 39_999, 40_000)
    if device == "cpu":
        check()  # the host is the device
    else:
        with pytest.raises(OffloadError, match=r"page-locked in its memory, .* 10% of it must be left .* nvme"):
            check()


@pytest.mark.parametrize(("device", "per_element"), [("cpu", 12), ("cuda", 12 + 4)])
def test_gradients_on_their_way_from_a_device_count_with_the_states(
    device: str, per_element: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        {"train_batch_size": 1, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    )
    member = SimpleNamespace(param=torch.empty(1000, device="meta"), trained=True)
    comm = SimpleNamespace(size=1, device=torch.device(device))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    host_with(monkeypatch, 1000 * per_element, 10**6)
    placement.check_room(config, [member], Precision(), optimizer, comm)
    host_with(monkeypatch, 1000 * per_element - 1, 10**6)
    with pytest.raises(OffloadError, match="to be offloaded"):
        placement.check_room(config, [member], Precision(), optimizer, comm)


def test_what_is_not_offloaded_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    host_with(monkeypatch, 0, 0)
    start({"stage": 3}).destroy()


@pytest.mark.parametrize("which", ["offload_optimizer", "offload_param"])
def test_a_disk_that_is_too_small_is_refused(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "there yet"
    zero = {"stage": 3, which: {"device": "nvme", "nvme_path": str(folder)}}
    needed = NUMEL * (12 if which == "offload_optimizer" else 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 0, needed if path == tmp_path else 0))
    start(zero).destroy()
    shutil.rmtree(tmp_path / "not")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 1, needed - 1))
    with pytest.raises(OffloadError, match=r"there yet: .* are to go there, and .* are free"):
        start(zero)
    assert not folder.exists(), "nothing was begun"


def test_ranks_of_a_host_count_together_and_one_that_has_no_room_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

    def body(ranks_here: int, room: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
        is_small = torch.distributed.get_rank() == 1
        host_with(monkeypatch, room if is_small else 100 * NUMEL, 100 * NUMEL)
        start(zero).destroy()

    run_ranks(2, body, 1, 6 * NUMEL)
    run_ranks(2, body, 2, 12 * NUMEL)

    def refused() -> str:
        with pytest.raises(ZerolithError, match="to be offloaded to its memory") as caught:
            body(2, 12 * NUMEL - 2)
        return str(caught.value)

    assert len(run_ranks(2, refused)) == 2


def test_the_memory_of_a_host_is_that_of_its_container(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    assert memory_of_host(proc=proc, cgroups=cgroups) is None
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n")
    assert memory_of_host(proc=proc, cgroups=cgroups) == (1024_000, 614_400)
    cgroups.mkdir()
    (cgroups / "memory.current").write_text("300000\n")
    for limit, expected in (("max", (1024_000, 614_400)), ("500000", (500_000, 200_000)), ("200000", (200_000, 0))):
        (cgroups / "memory.max").write_text(f"{limit}\n")
        assert memory_of_host(proc=proc, cgroups=cgroups) == expected


def test_this_host_has_memory() -> None:
    memory = memory_of_host()
    assert memory is None or 0 < memory[1] <= memory[0]


def test_a_run_goes_on_as_ever_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "memory_of_host", lambda: None)
    engine = start({"stage": 2, "offload_optimizer": {"device": "cpu"}})
    train_on(engine, token_batches(1, 2))
    engine.destroy()
