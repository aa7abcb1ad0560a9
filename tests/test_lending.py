"""offload_states and reload_states: memory is gone in between, and the training is as if nothing had happened."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zerolith
import zerolith.memory.away
from harness import run_ranks
from models import PRECISIONS, assert_same, make_gpt, my_pieces, token_batches, whole_weights, zero_config
from plain import STAGES
from zerolith.errors import OffloadError, UsageError
from zerolith.lending import KINDS
from zerolith.memory.away import Away
from zerolith.memory.pinned import host_bytes
from zerolith.zero import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_grad,
)

DATA = token_batches(4, 8)


class StateType(Enum):
    """As DeepSpeed's OffloadStateTypeEnum."""

    optim_states = "optim_states"
    lp_params = "lp_params"


def start(stage: int, world: int = 1, **more: Any) -> Any:
    micro = {"train_micro_batch_size_per_gpu": 4 // world, "gradient_accumulation_steps": 2}
    config = zero_config(stage, **{**micro, **more})
    return zerolith.initialize(model=make_gpt(), config=config)[0]


def backward(engine: Any, piece: Tensor) -> float:
    loss = engine(piece)
    engine.backward(loss)
    return loss.item()


def train(engine: Any, *, lends: list[Any] | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights. `lends`: what is offloaded before each step and in the midst of its accumulation."""
    losses = []
    for number, batch in enumerate(DATA):
        for piece in my_pieces(batch, engine):
            if lends is not None:
                engine.offload_states(lends[number % len(lends)])
                engine.reload_states()
            losses.append(backward(engine, piece))
            engine.step()
    return losses, whole_weights(engine)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_as_if_nothing_had_happened(world: int, precision: str) -> None:
    def body(stage: int, lends: list[Any] | None) -> Any:
        engine = start(stage, world, **PRECISIONS[precision])
        trained = train(engine, lends=lends)
        engine.destroy()
        return trained

    lends = [None, ["optim_states"], [StateType.lp_params], ["hp_params", "lp_grads"]]
    for stage in STAGES:
        lent = run_ranks(world, lambda s=stage: body(s, lends))
        plain = run_ranks(world, lambda s=stage: body(s, None))
        assert_same(lent, plain)


def held(engine: Any) -> dict[str, int]:
    """Bytes of storages, by kind."""
    sections = engine._sharded.sections
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    kinds = {
        "optim_states": [value for value in states if value.dim()],
        "hp_params": [section.main.data for section in sections if section.main is not None],
        "lp_params": [section.weights.data for section in sections],
        "lp_grads": [tensor for own in engine._sharded.gradients for tensor in own.held()],
    }
    storages = {
        kind: {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        for kind, tensors in kinds.items()
    }
    return {kind: sum(storage.nbytes() for storage in each.values()) for kind, each in storages.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_gone_in_between(stage: int) -> None:
    engine = start(stage, bf16={"enabled": True})
    train(engine)
    backward(engine, DATA[0, :4])
    engine._sharded.release_all()
    before = held(engine)
    assert all(before.values())
    for kind in before:
        engine.offload_states([kind])
        now = held(engine)
        assert now[kind] == 0
        assert all(now[other] == before[other] for other in before if other != kind)
        assert engine._away.nbytes == before[kind] > 0
        engine.reload_states()
        assert held(engine) == before
    engine.offload_states()
    assert not any(held(engine).values())
    engine.reload_states()
    assert held(engine) == before
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_away_is_not_touched(stage: int, tmp_path: Path) -> None:
    engine = start(stage, bf16={"enabled": True})
    train(engine)
    engine.save_checkpoint(tmp_path, tag="before")
    weight = engine.module.embed.weight
    with torch.no_grad():
        expected = engine(DATA[0, :4])
    engine.offload_states(["optim_states", "hp_params"])
    with torch.no_grad():
        assert torch.equal(engine(DATA[0, :4]), expected), "generation needs the weights only"
    for call in (
        lambda: engine.backward(engine(DATA[0, :4])),
        lambda: engine(DATA[0, :4]).backward(),
        lambda: engine.step(),
        lambda: engine.save_checkpoint(tmp_path),
        lambda: engine.load_checkpoint(tmp_path),
        lambda: engine.offload_states(["lp_params"]),
        lambda: safe_get_full_fp32_param(weight),
        lambda: safe_get_full_optimizer_state(weight, "exp_avg"),
    ):
        with pytest.raises(UsageError, match=r"offloaded; call engine\.reload_states"):
            call()
    engine.reload_states()
    engine.reset()
    engine.offload_states(["lp_params"])
    for call in (lambda: engine(DATA[0, :4]), lambda: engine.save_16bit_model(tmp_path)):
        with pytest.raises(UsageError, match=r"lp_params are offloaded; call engine\.reload_states"):
            call()
    if stage < 3:
        assert weight.isnan().all()
    else:
        with pytest.raises(UsageError, match="reload_states"):
            engine.module(DATA[0, :4])
    engine.reload_states()
    engine.reload_states()  # nothing is away
    with torch.no_grad():
        assert torch.equal(engine(DATA[0, :4]), expected)
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_are_away_are_not_taken_for_zeros(stage: int) -> None:
    engine = start(stage, gradient_accumulation_steps=1)
    backward(engine, DATA[0, :4])
    weight = engine.module.embed.weight
    before = safe_get_full_grad(weight)
    engine.offload_states(["lp_grads"])
    for call in (lambda: safe_get_full_grad(weight), lambda: safe_set_full_grad(weight, before)):
        with pytest.raises(UsageError, match=r"offloaded; call engine\.reload_states"):
            call()
    engine.reload_states()
    assert_same(safe_get_full_grad(weight), before)
    assert before.abs().max() > 0
    engine.destroy()


def test_destroy_brings_weights_back() -> None:
    engine = start(1)
    _, weights = train(engine)
    engine.offload_states()
    model = engine.module
    engine.destroy()
    assert_same({name: each.detach() for name, each in model.named_parameters()}, weights)


@pytest.mark.parametrize("stage", [1, 3])
def test_states_on_disk_stay_there(stage: int, tmp_path: Path) -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    plain, engine = (start(stage, zero_optimization=zero, bf16={"enabled": True}) for _ in range(2))
    expected = train(plain)
    assert_same(train(engine, lends=[None]), expected)
    for each in (plain, engine):
        each.destroy()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_without_room_is_told_on_all_ranks_and_all_is_back(rank: int) -> None:
    def body() -> Any:
        engine = start(3, 2)
        sizes = []

        def scarce(nbytes: int, *, pinned: bool) -> Tensor:
            sizes.append(nbytes)
            return host_bytes(2**60 if len(sizes) == 4 and engine.global_rank == rank else nbytes, pinned=pinned)

        train(engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zerolith.memory.away, "host_bytes", scarce)
            with pytest.raises(OffloadError, match="the host has no room for"):
                engine.offload_states()
        assert len(sizes) >= 4, "some were copied already"
        return train(engine)

    def plain() -> Any:
        engine = start(3, 2)
        train(engine)
        return train(engine)

    assert_same(run_ranks(2, body), run_ranks(2, plain))


def test_a_device_without_room_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls, bring_back = start(3), [], Away.bring_back

    def scarce(self: Away) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        bring_back(self)

    monkeypatch.setattr(Away, "bring_back", scarce)
    engine.offload_states()
    with pytest.raises(OffloadError, match="has no room"):
        engine.reload_states()
    with pytest.raises(UsageError, match="reload_states"):
        engine(DATA[0, :4])
    engine.reload_states()
    assert_same(train(engine), train(start(3)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"include": ["weights"]}, ["'weights'", *KINDS]), ({"device": "nvme"}, ["'nvme'", "cpu"])],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: list[str]) -> None:
    engine = start(1)
    with pytest.raises(UsageError) as caught:
        engine.offload_states(**arguments)
    assert all(word in str(caught.value) for word in words)
    train(engine)
