"""What load_checkpoint takes of a checkpoint, what it refuses, and what it says then."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt, token_batches, whole_weights, zero_config
from plain import STAGES, world_size
from zerolith.checkpoint import Reader
from zerolith.checkpoint.manifest import read_manifest
from zerolith.errors import CheckpointDamagedError, CheckpointError, UsageError

DATA = token_batches(6, 8)


def start(stage: int = 1, *, model: nn.Module | None = None, **more: Any) -> Any:
    config = zero_config(stage, train_micro_batch_size_per_gpu=8 // world_size(), **more)
    return zerolith.initialize(model=model or make_gpt(), config=config)[0]


def train(engine: Any, steps: int = 1) -> None:
    for batch in DATA[:steps]:
        engine.backward(engine(batch.chunk(world_size())[engine.global_rank]))
        engine.step()


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# --- what is loaded -----------------------------------------------------------------------------


def saved(tmp_path: Path, **more: Any) -> dict[str, Tensor]:
    engine = start(3, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, **more)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    return whole_weights(engine)


def test_the_model_alone(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    engine = start(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    train(engine)
    lr, state = engine.get_lr(), torch.get_rng_state()
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert_equal(whole_weights(engine), weights)
    assert engine.global_steps == 1
    assert engine.get_lr() == lr
    assert_equal(torch.get_rng_state(), state)


def test_without_optimizer_states_the_schedule_and_progress_still_come(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    engine = start(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    fresh_lr = engine.get_lr()
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert_equal(whole_weights(engine), weights)
    assert engine.global_steps == 3
    assert engine.get_lr() != fresh_lr
    assert all(not state for state in engine.basic_optimizer.state.values())
    other = start(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    other.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert other.lr_scheduler.state_dict()["last_epoch"] == 0


def test_an_engine_without_an_optimizer_takes_the_model(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine = zerolith.initialize(model=make_gpt(seed=4), config=config)[0]
    engine.load_checkpoint(tmp_path)
    assert_equal(whole_weights(engine), weights)


def test_masters_of_any_precision_load_into_any_other(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    engine = start(2, bf16={"enabled": True})
    engine.load_checkpoint(tmp_path)
    assert_equal(whole_weights(engine), {name: weight.bfloat16() for name, weight in weights.items()})
    engine.save_checkpoint(tmp_path / "again")
    back = start(0)
    back.load_checkpoint(tmp_path / "again")
    assert_equal(whole_weights(back), weights)  # fp32 masters lost nothing on the way


def test_every_name_and_shape_that_differs_is_listed(tmp_path: Path) -> None:
    engine = start(3)
    engine.save_checkpoint(tmp_path)
    weights = whole_weights(engine)

    def body() -> None:
        deeper = start(2, model=make_gpt(layers=4))
        with pytest.raises(CheckpointError, match=r"missing in the checkpoint: blocks\.3\.norm1\.weight, .*blocks\.3"):
            deeper.load_checkpoint(tmp_path)
        fewer = start(2, model=make_gpt(layers=2))
        with pytest.raises(CheckpointError, match=r"not in the model: blocks\.2\."):
            fewer.load_checkpoint(tmp_path)
        before = whole_weights(fewer)
        wider = start(2, model=make_gpt(vocab=128))
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"embed\.weight is \(64, 32\) in the checkpoint and \(128, 32\)"):
                wider.load_checkpoint(tmp_path, load_module_strict=strict)
        assert_equal(whole_weights(fewer), before)
        fewer.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)
        assert_equal(whole_weights(fewer), {name: weights[name] for name in before})
        train(wider)

    run_ranks(2, body)


def test_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    engine = start(1, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    with pytest.raises(CheckpointError, match=r"AdamW, this run's is torch\.optim\.sgd\.SGD.*_states=False"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    def model(seed: int) -> nn.Module:
        gpt = make_gpt(seed=seed)
        gpt.blocks[0].requires_grad_(False)
        return gpt

    def body() -> None:
        engine = start(3, model=model(0))
        train(engine)
        engine.save_checkpoint(tmp_path / "all", exclude_frozen_parameters=False)
        engine.save_checkpoint(tmp_path / "some", exclude_frozen_parameters=True)
        weights = whole_weights(engine)
        other = start(1, model=model(1))
        own = whole_weights(other)
        other.load_checkpoint(tmp_path / "some")
        frozen = {name for name in weights if name.startswith("blocks.0.")}
        assert_equal(whole_weights(other), {n: own[n] if n in frozen else weights[n] for n in weights})
        other.load_checkpoint(tmp_path / "all")
        assert_equal(whole_weights(other), weights)

    run_ranks(2, body)
    reader = Reader(tmp_path / "some" / "global_step1")
    assert not [name for name in reader.manifest.tensors if "blocks.0." in name]


def test_edits_of_weights_are_saved(tmp_path: Path) -> None:
    def body() -> dict[str, Tensor]:
        engine = start(3, bf16={"enabled": True})
        params = list(engine.module.parameters())
        with zerolith.zero.GatheredParameters(params, modifier_rank=0):
            if engine.global_rank == 0:
                for param in params:
                    param.data.mul_(2)
        engine.save_checkpoint(tmp_path)
        return whole_weights(engine)

    edited = run_ranks(2, body)[0]
    engine = start(0, bf16={"enabled": True}, model=make_gpt(seed=3))
    engine.load_checkpoint(tmp_path)
    assert_equal(whole_weights(engine), edited)


def test_a_damaged_checkpoint_leaves_an_engine_that_refuses_until_it_has_loaded_another(tmp_path: Path) -> None:
    engine = start()
    train(engine)
    engine.save_checkpoint(tmp_path, tag="good")
    weights = whole_weights(engine)
    engine.save_checkpoint(tmp_path, tag="bad")
    flip(tmp_path / "bad")
    fresh = start(model=make_gpt(seed=2))
    with pytest.raises(CheckpointDamagedError, match=r"bad/rank-00000-.*bytes \d+ to \d+ of tensor '"):
        fresh.load_checkpoint(tmp_path)
    for use in (lambda: train(fresh), lambda: fresh.save_checkpoint(tmp_path)):
        with pytest.raises(UsageError, match="failed half-way"):
            use()
    fresh.load_checkpoint(tmp_path, tag="good")
    assert_equal(whole_weights(fresh), weights)
    train(fresh)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_failed_does_not_keep_weights_from_being_loaded(stage: int, tmp_path: Path) -> None:
    """The step was to leave its result in the weights, and has not."""
    engine = start(stage, bf16={"enabled": True})
    train(engine)
    engine.save_checkpoint(tmp_path)
    weights = whole_weights(engine)
    train(engine, 2)
    for group in engine.optimizer.param_groups:
        group["lr"] = -1.0
    with pytest.raises(Exception, match="lr"):
        train(engine)
    engine.reset()
    engine.load_checkpoint(tmp_path)
    assert_equal(whole_weights(engine), weights)


def test_client_state_that_one_rank_cannot_read_stops_all(tmp_path: Path) -> None:
    tensor = Reader.tensor

    def body() -> str:
        engine = start(2)
        train(engine)
        engine.save_checkpoint(tmp_path, client_state={"mine": torch.arange(4.0)})
        engine._sharded.comm.max([0.0], name="saved")
        with pytest.MonkeyPatch.context() as patch:
            if engine.global_rank == 1:
                patch.setattr(Reader, "tensor", lambda self, name: 1 // 0 if "mine" in name else tensor(self, name))
            with pytest.raises((CheckpointError, ZeroDivisionError)) as caught:
                engine.load_checkpoint(tmp_path)
        with pytest.raises(UsageError, match="failed half-way"):
            train(engine)
        engine.load_checkpoint(tmp_path)
        train(engine)
        return str(caught.value)

    texts = run_ranks(2, body)
    assert "rank 1 failed" in texts[0]


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "AdamW"), (2, "AdamW"), (3, "AdamW"), (3, "Muon")])
def test_a_rank_that_finds_damage_stops_those_that_wait_for_it(stage: int, optimizer: str, tmp_path: Path) -> None:
    """Wherever in its file that is: before, among and after the sections whose weights ranks exchange as they come."""
    options = {"optimizer": {"type": optimizer, "params": {"lr": 1e-2}}}

    def save() -> None:
        engine = start(stage, **options)
        train(engine)
        engine.save_checkpoint(tmp_path, tag="good")

    def body() -> tuple[list[str], dict[str, Tensor]]:
        engine, texts = start(stage, model=make_gpt(seed=2), **options), []
        train(engine)
        for number in range(len(pieces)):
            with pytest.raises(CheckpointDamagedError) as caught:
                engine.load_checkpoint(tmp_path, tag=f"bad{number}")
            texts.append(str(caught.value))
        engine.load_checkpoint(tmp_path, tag="good")
        return texts, whole_weights(engine)

    run_ranks(2, save)
    home = tmp_path / "good"
    manifest = read_manifest(home)
    pieces = [
        (manifest.files[piece.file].name, piece.offset, name)
        for name, record in manifest.tensors.items()
        for piece in record.pieces
        if piece.file == 1
    ]
    assert len(pieces) > 20
    for number, (name, at, _) in enumerate(pieces):
        shutil.copytree(home, tmp_path / f"bad{number}")
        flip_at(tmp_path / f"bad{number}" / name, at)
    (texts, weights), (others, same) = run_ranks(2, body)
    for text, other, (file, _, name) in zip(texts, others, pieces, strict=True):
        assert f"/{file}: bytes" in other
        assert f"of tensor {name!r}" in other
        assert text in (other, f"loading a checkpoint: rank 1 failed: {other}")  # each may need a chunk of the file
    assert_equal(same, weights)
    engine = start(1, **options)
    engine.load_checkpoint(tmp_path, tag="good")
    assert_equal(whole_weights(engine), weights)


def test_the_one_before_a_damaged_one_is_taken_if_the_config_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start()
    for _ in range(3):
        train(engine)
        engine.save_checkpoint(tmp_path)
    flip(tmp_path / "global_step3")
    (tmp_path / "global_step2" / "manifest.json").write_text("{}")
    other = start(3, checkpoint={"on_damage": "previous"})
    with caplog.at_level(logging.WARNING, "zerolith"):
        assert other.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step1")
    assert "global_step3" in caplog.text
    assert "trying global_step1" in caplog.text
    assert other.global_steps == 1
    with pytest.raises(CheckpointDamagedError):
        other.load_checkpoint(tmp_path, tag="global_step3")


def flip(home: Path) -> None:
    """One bit in the last data file's middle."""
    path = sorted(home.glob("*.safetensors"))[-1]
    flip_at(path, path.stat().st_size // 2)


def flip_at(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


# --- unusual models -----------------------------------------------------------------------------


class Odd(nn.Module):
    """A GPT with buffers of odd strides and two names, and with extra state."""

    def __init__(self, *, has_state: bool = True) -> None:
        super().__init__()
        self.gpt = make_gpt()
        self.register_buffer("turned", torch.zeros(3, 2).t())
        self.register_buffer("again", self.turned)
        self.state = Stateful() if has_state else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        self.turned.add_(1)
        return self.gpt(tokens)


class Stateful(nn.Module):
    """Remembers a number."""

    number = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def test_buffers_of_odd_strides_and_two_names(tmp_path: Path) -> None:
    engine = start(3, model=Odd())
    train(engine, 2)
    engine.module.state.number = 5
    engine.save_checkpoint(tmp_path)
    engine.save_16bit_model(tmp_path)
    other = start(1, model=Odd())
    other.load_checkpoint(tmp_path)
    assert_equal(other.module.turned, torch.full((2, 3), 2.0))
    assert other.module.turned.stride() == (1, 2)
    assert other.module.state.number == 5
    whole = zerolith.checkpoint.get_fp32_state_dict(tmp_path)
    Odd().load_state_dict({**whole, "state._extra_state": {"number": 0}})


def test_extra_state_of_a_module_that_is_gone(tmp_path: Path) -> None:
    start(1, model=Odd()).save_checkpoint(tmp_path)
    other = start(1, model=Odd(has_state=False))
    with pytest.raises(CheckpointError, match=r"modules that the model lacks: \['state'\]"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)


def test_retention_stops_where_latest_cannot_be_read(tmp_path: Path) -> None:
    engine = start(1, checkpoint={"keep_last": 1})
    engine.save_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("global_step0\nwrong\n")
    train(engine)
    engine.save_checkpoint(tmp_path, save_latest=False)
    assert (tmp_path / "global_step0" / "manifest.json").exists()
