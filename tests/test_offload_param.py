"""Weights that rest elsewhere: the same bits as on the device, few of them in memory, and nothing that reads a hole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
import zerolith.placement
from harness import run_ranks
from models import (
    GPT,
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
from zerolith.errors import ConfigError, OffloadError, ShardedAccessError
from zerolith.memory import HostStore, StagedSwap, Store, SwapFile
from zerolith.pace import MOST
from zerolith.zero import GatheredParameters, Init, safe_get_full_fp32_param, safe_set_full_fp32_param

DATA = token_batches(4, 8)
CPU = torch.device("cpu")
STORES: dict[str, Callable[[Path], Store]] = {  # as for a GPU, where the host is another place
    "cpu": lambda folder: HostStore(CPU),
    "staged": lambda folder: StagedSwap(SwapFile(folder), CPU),
}


def config_for(folder: Path, weights: str, states: str = "none", **more: Any) -> dict[str, Any]:
    def offload(device: str) -> dict[str, Any]:
        return {"device": device, **({"nvme_path": str(folder)} if device == "nvme" else {})}

    zero = {"offload_param": offload(weights), "offload_optimizer": offload(states), "reduce_bucket_size": 4000}
    micro = 8 // world_size() // 2
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    return zero_config(3, zero_optimization=zero, **{**config, **more})


def start(folder: Path, weights: str, states: str = "none", *, model: nn.Module | None = None, **more: Any) -> Any:
    config = config_for(folder, "none" if weights in STORES else weights, states, **more)
    with pytest.MonkeyPatch.context() as patch:
        if weights in STORES:
            patch.setattr(zerolith.placement, "_weights_store", lambda *_: STORES[weights](folder))
        return zerolith.initialize(model=model or make_gpt(), config=config)[0]


def trained(folder: Path, weights: str, states: str = "none", **more: Any) -> Any:
    engine = start(folder, weights, states, **more)
    losses = train_on(engine, DATA)
    whole, masters = whole_weights(engine), whole_masters(engine)
    engine.destroy()
    return losses, whole, masters


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("weights", "states"), [("nvme", "none"), ("nvme", "nvme"), ("cpu", "cpu"), ("staged", "cpu")])
def test_where_weights_rest_changes_no_bit(weights: str, states: str, precision: str, tmp_path: Path) -> None:
    for world in (1, 2):
        plain, offloaded = (
            run_ranks(world, lambda w=where, s=how: trained(tmp_path, w, s, **PRECISIONS[precision]))
            for where, how in (("none", "none"), (weights, states))
        )
        assert_same(offloaded, plain)
    assert list(tmp_path.iterdir()) == [], "files have no names"


def test_four_ranks(tmp_path: Path) -> None:
    plain, offloaded = (run_ranks(4, lambda w=where: trained(tmp_path, w, w)) for where in ("none", "nvme"))
    assert_same(offloaded, plain)


@pytest.mark.parametrize("more", [{"zero_optimization": {"stage3_prefetch_bucket_size": 0}}, {}], ids=["no", "yes"])
def test_gathering_ahead_or_not_and_checkpointing_change_nothing(more: dict[str, Any], tmp_path: Path) -> None:
    def body(weights: str) -> Any:
        config = config_for(tmp_path, weights, activation_checkpointing={"policy": "full"})
        config["zero_optimization"].update(more.get("zero_optimization", {}))
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        return train_on(engine, DATA), whole_weights(engine)

    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


def in_memory(engine: Any) -> int:
    """Bytes of weights' shards."""
    sections = [section for section in engine._sharded.sections if section.is_sharded]
    return sum(section.weights.data.untyped_storage().nbytes() for section in sections)


class Deep(nn.Module):
    """Many blocks of one size."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(depth)])
        self.seen: list[int] = []
        self.watch: Callable[[], int] = lambda: 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            self.seen.append(self.watch())
        return x.square().mean()


def test_only_units_in_use_and_those_ahead_are_in_memory(tmp_path: Path) -> None:
    engine = start(tmp_path, "nvme", "nvme", model=Deep(24), gradient_accumulation_steps=1)
    model, block = engine.module, max(section.weights.data.nbytes for section in engine._sharded.sections)
    model.watch = lambda: in_memory(engine)
    total = engine._sharded.residency.nbytes
    assert total >= 24 * 64 * 65 * 4
    engine._sharded.residency.settle()
    assert in_memory(engine) == 0
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 64)))
        engine.step()
    assert max(model.seen) <= (MOST + 3) * block < total, "what is read ahead, the one in use, and what is written"
    engine._sharded.release_all()
    assert "weights on disk" in str(engine.summary())
    engine.destroy()


def test_a_model_without_an_optimizer_generates(tmp_path: Path) -> None:
    def body(weights: str) -> Tensor:
        config = config_for(tmp_path, weights)
        del config["optimizer"]
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        with torch.no_grad():
            losses = [engine(batch) for batch in DATA for _ in range(2)]
        return torch.stack(losses)

    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


def test_a_model_that_is_built_sharded(tmp_path: Path) -> None:
    def body(weights: str) -> Any:
        config = config_for(tmp_path, weights)
        torch.manual_seed(0)
        with Init(config_dict_or_path=config):
            model = GPT()
        engine = zerolith.initialize(model=model, config=config)[0]
        return train_on(engine, DATA), whole_weights(engine)

    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


@pytest.mark.parametrize("behind", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
def test_checkpoints_access_and_edits(frozen: bool, behind: bool, tmp_path: Path) -> None:
    def body(weights: str) -> Any:
        model = make_gpt()
        if frozen:
            for param in model.blocks[0].parameters():
                param.requires_grad_(False)
        options = {"bf16": {"enabled": True}, "checkpoint": {"async_save": behind}}
        engine = start(tmp_path / "swap", weights, model=model, **options)
        train_on(engine, DATA[:1])
        params = dict(engine.module.named_parameters())
        with GatheredParameters([params["norm.weight"], params["blocks.0.up.weight"]], modifier_rank=0):
            if engine.global_rank == 0:
                params["norm.weight"].data.mul_(2)
                params["blocks.0.up.weight"].data.mul_(0.5)
        safe_set_full_fp32_param(
            params["blocks.1.up.weight"], safe_get_full_fp32_param(params["blocks.1.up.weight"]) * 2
        )
        engine.save_checkpoint(tmp_path / weights)
        engine.save_16bit_model(tmp_path / f"{weights}.16bit")
        train_on(engine, DATA[1:3])
        before = whole_weights(engine)
        engine.load_checkpoint(tmp_path / weights)
        losses = train_on(engine, DATA[1:3])
        again = start(
            tmp_path / "swap", "none" if weights == "nvme" else "nvme", model=model_of(frozen), bf16={"enabled": True}
        )
        again.load_checkpoint(tmp_path / weights)
        elsewhere = train_on(again, DATA[1:3])
        assert elsewhere == losses
        return before, losses, whole_weights(engine), whole_weights(again)

    plain, offloaded = run_ranks(2, body, "none"), run_ranks(2, body, "nvme")
    assert_same(offloaded, plain)
    for before, _, after, again in plain:
        assert_same(after, before)
        assert_same(again, before)
    one, other = ((tmp_path / f"{name}.16bit" / "model.safetensors").read_bytes() for name in ("none", "nvme"))
    assert one == other


def model_of(frozen: bool) -> nn.Module:
    model = make_gpt(seed=3)
    if frozen:
        for param in model.blocks[0].parameters():
            param.requires_grad_(False)
    return model


def test_what_is_not_in_memory_is_refused_by_name(tmp_path: Path) -> None:
    engine = start(tmp_path, "nvme")
    train_on(engine, DATA[:1])
    state = engine.module.state_dict()
    name, stand_in = next((name, each) for name, each in state.items() if "up.weight" in name)
    for call in (lambda: stand_in.local, lambda: stand_in.detach().local, lambda: stand_in.copy_(torch.zeros(128, 32))):
        with pytest.raises(ShardedAccessError, match=f"{name}.*not in memory.*save_checkpoint") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="not in memory"):  # torch's, with what each parameter says
        engine.module.load_state_dict(make_gpt().state_dict())
    with GatheredParameters(list(engine.module.parameters())):
        assert engine.module.blocks[0].up.weight.isfinite().all()
    engine.destroy()


def test_integrity_and_lending_leave_them_alone(tmp_path: Path) -> None:
    def body(weights: str) -> Any:
        engine = start(tmp_path, weights, "nvme" if weights == "nvme" else "none", integrity_interval=1)
        train_on(engine, DATA[:1])
        engine.offload_states()
        engine.reload_states()
        return train_on(engine, DATA[1:]), whole_weights(engine)

    assert_same(run_ranks(2, body, "nvme"), run_ranks(2, body, "none"))


@pytest.mark.parametrize("how", ["fails", "flips"])
def test_a_disk_that_fails_in_forward_is_named(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(tmp_path, "nvme")
    train_on(engine, DATA[:1])
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int) -> int:
        if how == "fails":
            raise OSError(5, "Input/output error")
        count = real(file, buffers, offset)
        buffers[0][0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    words = "Input/output error" if how == "fails" else "not what was written"
    with pytest.raises(OffloadError, match=f"{tmp_path}.*{words}"):
        train_on(engine, DATA[1:2])


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, ["offload_param", "stage 3"]),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, ["offload_param.nvme_path"]),
        ({"stage": 3, "offload_param": {"device": "disk"}}, ["offload_param.device", "nvme"]),
    ],
)
def test_a_wrong_config_is_refused(zero: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        zerolith.initialize(model=make_gpt(), config={"train_batch_size": 8, "zero_optimization": zero})
    assert all(word in str(caught.value) for word in words)


def test_on_a_machine_without_a_gpu_the_host_is_the_device(tmp_path: Path) -> None:
    engine = start(tmp_path, "none")
    config = config_for(tmp_path, "cpu")
    here = zerolith.initialize(model=make_gpt(), config=config)[0]
    assert in_memory(here) == in_memory(engine) > 0
    assert_same(train_on(here, DATA), train_on(engine, DATA))
