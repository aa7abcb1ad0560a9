"""States on disk or in host memory: the same bits as without, faults that end all ranks, and no memory kept."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import (
    OPTIMIZERS,
    PRECISIONS,
    assert_same,
    make_gpt,
    token_batches,
    train_on,
    whole_masters,
    whole_weights,
    zero_config,
)
from plain import world_size
from zerolith.errors import ConfigError, OffloadError, UsageError
from zerolith.memory import SwapFile, resident_bytes
from zerolith.memory.pages import address_of, page_buffer
from zerolith.memory.residency import wait_for_all
from zerolith.zero import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

DATA = token_batches(5, 8)


def config_for(stage: int, device: str, folder: Path, *, ratio: float = 1.0, **more: Any) -> dict[str, Any]:
    offload = {"device": device, "ratio": ratio, **({"nvme_path": str(folder)} if device == "nvme" else {})}
    micro = 8 // world_size() // 2
    zero = {"offload_optimizer": offload, "reduce_bucket_size": 4000}
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    return zero_config(stage, zero_optimization=zero, **{**config, **more})


def start(stage: int, device: str, folder: Path, *, make: Callable[..., Any] | None = None, **more: Any) -> Any:
    config = config_for(stage, device, folder, **more)
    if make is not None:
        del config["optimizer"]
    return zerolith.initialize(model=make_gpt(), config=config, optimizer=make)[0]


def trained(stage: int, device: str, folder: Path, **more: Any) -> tuple[list[float], dict[str, Tensor], Tensor]:
    engine = start(stage, device, folder, **more)
    losses = train_on(engine, DATA)
    weights, masters = whole_weights(engine), whole_masters(engine)
    engine.destroy()
    return losses, weights, masters


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_where_states_rest_changes_no_bit(stage: int, precision: str, tmp_path: Path) -> None:
    for world in (1, 2):
        plain, host, disk = (
            run_ranks(world, lambda d=device: trained(stage, d, tmp_path, **PRECISIONS[precision]))
            for device in ("none", "cpu", "nvme")
        )
        assert_same(host, plain)
        assert_same(disk, plain)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_four_ranks(tmp_path: Path) -> None:
    plain, disk = (run_ranks(4, lambda d=device: trained(3, d, tmp_path)) for device in ("none", "nvme"))
    assert_same(disk, plain)


# --- a share of them ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32"), (3, "fp16")])
def test_which_share_of_the_states_is_on_disk_changes_no_bit(
    stage: int, precision: str, ratio: float, tmp_path: Path
) -> None:
    plain, disk = (
        run_ranks(2, lambda d=device: trained(stage, d, tmp_path, ratio=ratio, **PRECISIONS[precision]))
        for device in ("none", "nvme")
    )
    assert_same(disk, plain)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_the_first_units_states_stay_in_memory(ratio: float, tmp_path: Path) -> None:
    whole, engine = (start(3, "nvme", tmp_path, ratio=share, bf16={"enabled": True}) for share in (1.0, ratio))
    sections = [section for section in engine._sharded.sections if section.trained]
    numel = {section: sum(member.param.numel() for member in section.members) for section in sections}
    offloaded = sum(count for section, count in numel.items() if section.is_offloaded)
    assert ratio * sum(numel.values()) <= offloaded <= ratio * sum(numel.values()) + max(numel.values())
    stays = [section.is_offloaded for section in sections].index(True) if ratio else len(sections)
    assert not any(section.is_offloaded for section in sections[:stays])
    assert ratio > 0.5 or stays > 1
    for each in (whole, engine):
        train_on(each, DATA[:1])
        each._partitioned.catch_up()
        each._partitioned.residency.settle()
    gone = [section for section in sections if not section.main.data.untyped_storage().nbytes()]
    assert all(section.is_offloaded for section in gone)
    assert len(gone) >= sum(section.is_offloaded for section in sections) - 1, "but for the one that is read ahead"
    assert engine._partitioned.residency.nbytes <= whole._partitioned.residency.nbytes
    if ratio:
        assert f" {offloaded / sum(numel.values()):.0%} of masters and states on disk" in str(engine.summary())
    for each in (whole, engine):
        each.destroy()


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_access_checkpoints_integrity_and_lending_with_a_share_on_disk(optimizer: str, tmp_path: Path) -> None:
    options = {"optimizer": {"type": optimizer, "params": {"lr": 1e-2}}, "bf16": {"enabled": True}}

    def body(device: str, ratio: float, loaded: float) -> Any:
        engine = start(2, device, tmp_path / "swap", ratio=ratio, integrity_interval=1, **options)
        train_on(engine, DATA[:2])
        for param in engine.module.parameters():
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 1.5)
        engine.offload_states()
        engine.reload_states()
        engine.save_checkpoint(tmp_path / f"{device}-{ratio}")
        engine.destroy()
        engine = start(2, device, tmp_path / "swap", ratio=loaded, **options)
        engine.load_checkpoint(tmp_path / f"{device}-{ratio}")
        return train_on(engine, DATA[2:]), whole_masters(engine)

    plain = run_ranks(2, body, "none", 1.0, 1.0)
    for ratio, loaded in ((0.5, 0.5), (0.5, 1.0), (1.0, 0.3)):
        assert_same(run_ranks(2, body, "nvme", ratio, loaded), plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_steps_from_disk(name: str, tmp_path: Path) -> None:
    plain, disk = (
        run_ranks(2, lambda d=device: trained(2, d, tmp_path, make=OPTIMIZERS[name], bf16={"enabled": True}))
        for device in ("none", "nvme")
    )
    assert_same(disk, plain)


def test_a_parameter_that_is_not_always_used_keeps_its_state_on_disk(tmp_path: Path) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.always, self.rare = nn.Linear(8, 300), nn.Linear(8, 300)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.always(x) + (self.rare(x) if self.calls % 2 else 0)
            return x.square().mean()

    def body(device: str) -> dict[str, Tensor]:
        torch.manual_seed(world_size())
        config = config_for(1, device, tmp_path, gradient_accumulation_steps=1)
        engine = zerolith.initialize(model=Sometimes(), config=config)[0]
        for _ in range(5):
            engine.backward(engine(torch.randn(2, 8)))
            engine.step()
        return whole_weights(engine)

    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


def test_access_edits_and_checkpoints_see_what_is_on_disk(tmp_path: Path) -> None:
    def body(device: str) -> Any:
        engine = start(3, device, tmp_path / "swap", bf16={"enabled": True})
        train_on(engine, DATA[:2])
        params = dict(engine.module.named_parameters())
        param = params["blocks.0.up.weight"]
        state = safe_get_full_optimizer_state(param, "exp_avg")
        safe_set_full_optimizer_state(param, state * 2, "exp_avg")
        safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) + 1)
        local = safe_get_local_optimizer_state(param, "exp_avg_sq")
        engine.save_checkpoint(tmp_path / device)
        with zerolith.zero.GatheredParameters([params["norm.weight"]], modifier_rank=0):
            if engine.global_rank == 0:
                params["norm.weight"].data.mul_(2)
        train_on(engine, DATA[2:4])
        before = whole_weights(engine)
        engine.load_checkpoint(tmp_path / device)
        train_on(engine, DATA[2:4])
        return state, local, before, whole_weights(engine)

    plain, disk = run_ranks(2, body, "none"), run_ranks(2, body, "nvme")
    assert_same(disk, plain)


def test_what_is_on_disk_cannot_be_read_by_mistake(tmp_path: Path) -> None:
    engine = start(2, "nvme", tmp_path, bf16={"enabled": True})
    assert "masters and states on disk" in str(engine.summary())
    train_on(engine, DATA[:1])
    inner = engine.basic_optimizer
    assert [group["params"] for group in inner.param_groups] == [[]]
    assert not any(inner.state.values())
    engine.destroy()
    assert inner.param_groups[0]["params"]


def test_memory_holds_three_sections_at_most(tmp_path: Path) -> None:
    engine = start(1, "nvme", tmp_path, bf16={"enabled": True})
    train_on(engine, DATA[:2])
    residency = engine._partitioned.residency
    sections = {own: sum(held.region.nbytes for held in held.values()) for own, held in residency._held.items()}
    assert len(sections) > 4
    assert residency.nbytes >= sum(sections.values()) >= 12 * sum(p.numel() for p in make_gpt().parameters())
    most = 0
    step = type(engine.basic_optimizer).step

    def watched(*args: Any) -> Any:
        nonlocal most
        held = [each.storage.nbytes() for section in residency._held.values() for each in section.values()]
        most = max(most, sum(held))
        return step(engine.basic_optimizer, *args)

    engine.basic_optimizer.step = watched
    train_on(engine, DATA[2:])
    assert 0 < most <= sum(sorted(sections.values())[-3:])
    residency.settle()
    at_rest = sum(each.storage.nbytes() for section in residency._held.values() for each in section.values())
    assert at_rest <= max(sections.values()), "but for the section that is read ahead"


STEPS = 200


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_nothing_is_kept_over_many_steps(device: str, tmp_path: Path) -> None:
    """Tensors, files, threads and the swap file are as many and as large after 200 steps as after a few."""

    def body() -> None:
        gc.freeze()  # what other tests have left to the collector is not looked at
        engine = start(3, device, tmp_path, bf16={"enabled": True})
        data = DATA[torch.arange(STEPS) % len(DATA)]

        def held() -> tuple[int, int, int, int]:
            gc.collect()
            engine._partitioned.catch_up()
            engine._partitioned.residency.settle()
            storages = {
                each.untyped_storage()._cdata: each.untyped_storage().nbytes()
                for each in gc.get_objects()
                if type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided  # others have no storage
            }
            files = len(os.listdir("/proc/self/fd"))
            return sum(storages.values()), files, threading.active_count(), engine._partitioned.residency.nbytes

        train_on(engine, data[:10])
        before, resident = held(), resident_bytes()
        train_on(engine, data[10:])
        assert held() == before
        assert resident_bytes() - resident < 32 * 2**20, "what Python and the allocator keep does not grow with steps"
        engine.destroy()

    run_ranks(1, body)


# --- memory ---


class Late:
    """A transfer that fails or not, and knows whether it has been waited for."""

    def __init__(self, error: OffloadError | None) -> None:
        self.error, self.is_done = error, False

    def wait(self) -> None:
        self.is_done = True
        if self.error is not None:
            raise self.error


def test_a_failed_transfer_leaves_no_other_under_way() -> None:
    transfers = [Late(None), Late(OffloadError("first")), Late(OffloadError("second")), Late(None)]
    with pytest.raises(OffloadError, match="first"):
        wait_for_all(transfers)
    assert all(each.is_done for each in transfers)


def test_memory_that_is_there_is_not_moved() -> None:
    buffer = start(1, "none", Path())._sharded.sections[0].whole
    address = buffer.data.data_ptr()
    buffer.allocate()
    assert buffer.data.data_ptr() == address


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["pwrite", "preadv"])
def test_a_disk_that_fails_ends_all_ranks_with_the_cause(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> str:
        engine = start(2, "nvme", tmp_path / "swap", bf16={"enabled": True})
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path / "checkpoints")
        if engine.global_rank == 1:
            monkeypatch.setattr(f"os.{operation}", failing)
        with pytest.raises(OffloadError) as caught:
            train_on(engine, DATA[1:4])
        monkeypatch.undo()
        with pytest.raises(UsageError, match="the last step failed half-way"):
            train_on(engine, DATA[:1])
        engine.load_checkpoint(tmp_path / "checkpoints")
        train_on(engine, DATA[:1])
        engine.destroy()
        return str(caught.value)

    def failing(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    for text in run_ranks(2, body):
        assert "Input/output error while" in text
        assert str(tmp_path / "swap") in text


class HalfUsed(nn.Module):
    """One parameter is not used every other time, so that pieces are cut in the second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rare, self.calls = nn.Linear(8, 300), nn.Linear(8, 300), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.always(x) + (self.rare(x) if self.calls % 2 else 0)).square().mean()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_disk_that_fails_while_pieces_are_cut_ends_all_ranks(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    def body() -> None:
        config = config_for(stage, "nvme", tmp_path, gradient_accumulation_steps=1)
        engine = zerolith.initialize(model=HalfUsed(), config=config)[0]
        engine.backward(engine(torch.ones(2, 8)))
        engine.step()
        engine._partitioned.catch_up()
        engine._partitioned.residency.settle()
        if engine.global_rank == 1:
            monkeypatch.setattr("os.preadv", failing)
        with pytest.raises(OffloadError, match="Input/output error"):
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 8)))
                engine.step()
        engine.destroy()

    run_ranks(2, body)


def test_lending_leaves_alone_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(device: str) -> Any:
        engine = start(3, device, tmp_path, bf16={"enabled": True})
        losses = train_on(engine, DATA[:2])
        for include in (["optim_states"], None):
            engine.offload_states(include)
            engine.reload_states()
            losses += train_on(engine, DATA[2:4])
        return losses, whole_weights(engine), whole_masters(engine)

    def late(real: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (time.sleep(0.02), real(*args))[1]

    for name in ("_read_block", "_write_block"):
        monkeypatch.setattr(SwapFile, name, late(getattr(SwapFile, name)))
    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


def test_a_state_dict_of_states_on_disk_is_refused(tmp_path: Path) -> None:
    engine = start(2, "nvme", tmp_path)
    train_on(engine, DATA[:1])
    for call in (engine.optimizer.state_dict, lambda: engine.optimizer.load_state_dict({})):
        with pytest.raises(UsageError, match=r"on disk .* use engine.save_checkpoint"):
            call()
    engine.destroy()


def test_who_leaves_after_the_store_was_given_up_just_leaves(tmp_path: Path) -> None:
    engine = start(2, "nvme", tmp_path)
    residency = engine._partitioned.residency
    own = engine._partitioned.gradients[0]
    residency._enter(own)
    residency.abandon()
    residency._leave(own)
    engine.destroy()


def test_a_flipped_bit_on_disk_is_not_stepped_with(tmp_path: Path) -> None:
    engine = start(1, "nvme", tmp_path, bf16={"enabled": True})
    train_on(engine, DATA[:1])
    residency = engine._partitioned.residency
    residency.settle()
    own = engine._partitioned.gradients[2]
    region = next(iter(residency._held[own].values())).region
    region.digests[0] ^= 1
    with pytest.raises(OffloadError, match="are not what was written there"):
        train_on(engine, DATA[1:2])


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OffloadError, match="No space left on device while making room"):
        start(1, "nvme", tmp_path, bf16={"enabled": True})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "choose stage 1, 2 or 3"),
        ({"stage": 1, "offload_optimizer": {"device": "nvme"}}, "needs a folder"),
        ({"stage": 1, "offload_optimizer": {"device": "disk"}}, "device"),
        ({"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 1.5}}, "ratio"),
    ],
    ids=["stage 0", "no folder", "unknown", "ratio"],
)
def test_wrong_configs(zero: dict[str, Any], message: str) -> None:
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": zero}
    with pytest.raises(ConfigError, match=message):
        zerolith.initialize(model=make_gpt(), config=config)


def test_a_folder_that_cannot_be_made_stops_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def body() -> None:
        with pytest.raises(zerolith.errors.ZerolithError, match="making the swap file"):
            start(1, "nvme", tmp_path / "file" / "swap")

    run_ranks(2, body)


def test_a_disk_that_is_full_when_states_are_made_leaves_an_optimizer_that_steps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is loaded then: also weights alone, which leave its lists of tensors as they are."""
    engine = start(2, "none", tmp_path)
    train_on(engine, DATA[:1])
    engine.save_checkpoint(tmp_path / "saved")
    plain, disk = (start(2, device, tmp_path) for device in ("none", "nvme"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OffloadError, match="No space left"):
            train_on(disk, DATA[:1])
    disk.reset()
    for each in (plain, disk):
        each.load_checkpoint(tmp_path / "saved", load_optimizer_states=False)
    pieces = [id(param) for group in disk.optimizer.param_groups for param in group["params"]]
    assert len(pieces) == len(set(pieces))
    for own in disk._partitioned.gradients:
        for piece in disk._partitioned.pieces[own]:
            disk.optimizer.state.pop(piece.param, None)
    assert_same(train_on(disk, DATA[1:3]), train_on(plain, DATA[1:3]))
    for each in (engine, plain, disk):
        each.destroy()


# --- the file -----------------------------------------------------------------------------------


class Memory:
    """What stands for a storage: bytes that begin `at` so many after a page does."""

    def __init__(self, content: bytes, at: int) -> None:
        self.page = page_buffer(len(content) + 4096)
        self.at, self.nbytes = at, len(content)
        self.page[at : at + self.nbytes] = content

    def data_ptr(self) -> int:
        return address_of(self.page) + self.at

    def content(self) -> bytes:
        return bytes(self.page[self.at : self.at + self.nbytes])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1, 511, 4095, 4096, 4097, 4 * 2**20, 9 * 2**20 + 13])
@pytest.mark.parametrize(("written_at", "read_at"), [(0, 0), (64, 64), (64, 640), (8, 4088), (600, 0)])
@pytest.mark.parametrize("grain", [512, 4096])
def test_what_is_written_is_read(
    direct: bool, nbytes: int, written_at: int, read_at: int, grain: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("zerolith.memory.swap.GRAIN", grain)
    swap = SwapFile(tmp_path, direct=direct)
    content = random.Random(nbytes).randbytes(nbytes)
    source, other, target = Memory(content, written_at), Memory(b"1" * 100, 0), Memory(bytes(nbytes), read_at)
    regions = [swap.add(nbytes), swap.add(100)]
    for transfer in [swap.write(regions[0], source), swap.write(regions[1], other)]:
        transfer.wait()
    swap.read(regions[0], target).wait()
    assert target.content() == content
    swap.close()


def test_a_broken_disk_is_noticed_byte_for_byte(tmp_path: Path) -> None:
    import os

    swap = SwapFile(tmp_path, direct=False)
    source = torch.arange(10_000)
    region = swap.add(source.nbytes)
    swap.write(region, source.untyped_storage()).wait()
    os.pwrite(swap._file, b"\1", 12_345)
    with pytest.raises(OffloadError, match=r"bytes 0 to 80000 of the swap file are not what was written"):
        swap.read(region, torch.empty_like(source).untyped_storage()).wait()
    swap.close()
