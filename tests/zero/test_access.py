"""GatheredParameters and the safe getters and setters, against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from zerolith.engine import Engine
from zerolith.errors import UsageError
from zerolith.zero import (
    GatheredParameters,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
PRECISIONS = pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}


def make_engine(stage: int, **overrides: Any) -> Engine:
    config = zero_config(stage, **{"optimizer": SGD, **overrides})
    engine, *_ = zerolith.initialize(model=make_gpt(), config=config)
    return engine


def backward(engine: Engine, batch: Tensor) -> None:
    engine.backward(engine(batch.chunk(engine.world_size)[engine.global_rank]))


def plain_grads(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    model(batch).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def compare_with_plain(stage: int) -> None:
    data = token_batches(2, 8)
    engine, model = make_engine(stage), make_gpt()
    oracle = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert safe_get_full_grad(engine.module.embed.weight) is None
    for batch in data:
        backward(engine, batch)
        grads = plain_grads(model, batch)
        for name, param in engine.module.named_parameters():
            torch.testing.assert_close(safe_get_full_grad(param), grads[name], rtol=1e-4, atol=1e-6)
        engine.step()
        oracle.step()
        oracle.zero_grad()
    for (_, param), plain in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(safe_get_full_fp32_param(param), plain.detach(), rtol=1e-4, atol=1e-6)
        momentum = oracle.state[plain]["momentum_buffer"]
        torch.testing.assert_close(
            safe_get_full_optimizer_state(param, "momentum_buffer"), momentum, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UsageError, match="momentum_buffer"):
        safe_get_full_optimizer_state(engine.module.embed.weight, "exp_avg")


@STAGES
@pytest.mark.parametrize("world", [1, 2])
def test_masters_gradients_and_states_are_those_of_plain_pytorch(world: int, stage: int) -> None:
    run_ranks(world, compare_with_plain, stage)


def set_everything(stage: int, precision: dict[str, Any]) -> None:
    engine = make_engine(stage, **precision)
    data = token_batches(2, 8)
    backward(engine, data[0])
    engine.step()
    param = engine.module.blocks[1].up.weight
    new = torch.arange(param.numel(), dtype=torch.float32).view(param.shape) / 1000 + 1e-6
    safe_set_full_fp32_param(param, new)
    assert torch.equal(safe_get_full_fp32_param(param), new)
    with GatheredParameters([param]):
        assert torch.equal(engine.module.blocks[1].up.weight, new.to(param.dtype))
    safe_set_full_optimizer_state(param, new * 2, "momentum_buffer")
    assert torch.equal(safe_get_full_optimizer_state(param, "momentum_buffer"), new * 2)
    backward(engine, data[1])
    safe_set_full_grad(param, torch.ones_like(new))
    assert torch.equal(safe_get_full_grad(param), torch.ones_like(new))
    engine.step()
    expected = new - 0.05 * (0.9 * (new * 2) + 1.0)
    torch.testing.assert_close(safe_get_full_fp32_param(param), expected)


@STAGES
@PRECISIONS
def test_what_is_set_is_what_the_next_step_uses(stage: int, precision: dict[str, Any]) -> None:
    run_ranks(2, set_everything, stage, precision)


def norm_of_edited(stage: int, precision: dict[str, Any], micro_batches: int) -> None:
    engine = make_engine(stage, gradient_accumulation_steps=micro_batches, **precision)
    data = token_batches(1, 8 * micro_batches)[0].chunk(micro_batches)
    for part in data:
        backward(engine, part)
        grads = {name: safe_get_full_grad(param) for name, param in engine.module.named_parameters()}
        if part is not data[-1]:
            engine.step()
    edited = dict(list(grads.items())[::2])
    for number, name in enumerate(edited):
        grads[name] = torch.full_like(grads[name], float(number))
        safe_set_full_grad(engine.module.get_parameter(name), grads[name])
    engine.step()
    squares = (float(grad.double().square().sum()) for grad in grads.values())
    assert engine.get_global_grad_norm() == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-6)


@STAGES
@PRECISIONS
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_norm_is_that_of_gradients_as_they_were_set(
    stage: int, precision: dict[str, Any], micro_batches: int
) -> None:
    run_ranks(2, norm_of_edited, stage, precision, micro_batches)


class HalfUsed(nn.Module):
    """Its second layer gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().mean()


def set_grads_at_any_time(stage: int) -> None:
    torch.manual_seed(0)
    config = zero_config(stage, gradient_accumulation_steps=2, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    engine = start_engine(HalfUsed(), config)
    param = engine.module.idle.weight
    local = safe_get_local_fp32_param(param)
    with pytest.raises(UsageError, match=r"idle.weight.*backward"):
        safe_set_full_grad(param, torch.ones(8, 8))
    with pytest.raises(UsageError, match=r"idle.weight.*backward"):
        safe_set_local_grad(param, torch.ones_like(local))
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 8)))
    before = safe_get_full_fp32_param(param)
    safe_set_full_grad(param, torch.ones(8, 8))
    engine.step()
    assert torch.equal(safe_get_full_fp32_param(param), before - 1.0), "also what backward gave no gradient"


@STAGES
def test_a_gradient_that_would_be_lost_is_refused(stage: int) -> None:
    run_ranks(2, set_grads_at_any_time, stage)


def local_parts(stage: int) -> tuple[Tensor, ...]:
    engine = make_engine(stage)
    backward(engine, token_batches(1, 8)[0])
    param = engine.module.blocks[1].up.weight
    grad = (safe_get_local_grad(param), safe_get_full_grad(param).reshape(-1))
    engine.step()
    safe_set_local_fp32_param(param, safe_get_local_fp32_param(param) * 2)
    safe_set_local_optimizer_state(
        param, safe_get_local_optimizer_state(param, "momentum_buffer") * 3, "momentum_buffer"
    )
    value = (safe_get_local_fp32_param(param), safe_get_full_fp32_param(param).reshape(-1))
    state = (
        safe_get_local_optimizer_state(param, "momentum_buffer"),
        safe_get_full_optimizer_state(param, "momentum_buffer").reshape(-1),
    )
    with pytest.raises(UsageError, match="elements"):
        safe_set_local_fp32_param(param, torch.zeros(3))
    return (*grad, *value, *state)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_local_parts_of_all_ranks_make_the_whole(stage: int) -> None:
    ranks = run_ranks(2, local_parts, stage)
    for kind in range(3):
        parts, whole = [rank[2 * kind] for rank in ranks], ranks[0][2 * kind + 1]
        assert torch.equal(torch.cat(parts), whole)


def edit_by_one_rank(stage: int, precision: dict[str, Any], modifier: int) -> None:
    engine = make_engine(stage, **precision)
    rank = engine.global_rank
    target, untouched = engine.module.blocks[0].out, engine.module.blocks[0].qkv
    before = safe_get_full_fp32_param(untouched.weight)
    handles = [target.weight, None, untouched.weight, target.bias, target.weight]  # taken at rest
    with GatheredParameters((handle for handle in handles), modifier_rank=modifier):
        if rank == modifier:
            nn.init.constant_(target.weight, 0.5)
            handles[3].data.fill_(0.25)
    assert (safe_get_full_fp32_param(target.weight) == 0.5).all()
    assert (safe_get_full_fp32_param(target.bias) == 0.25).all()
    # The masters of what was not edited keep the bits that bf16 weights cannot hold.
    assert torch.equal(safe_get_full_fp32_param(untouched.weight), before)
    with GatheredParameters([target.weight]):
        assert (target.weight == 0.5).all()
    backward(engine, token_batches(1, 8)[0])
    engine.step()


@STAGES
@PRECISIONS
def test_edits_of_the_modifier_rank_are_kept_by_all(stage: int, precision: dict[str, Any]) -> None:
    run_ranks(2, edit_by_one_rank, stage, precision, 1)


def edit_without_modifier(only_rank: int | None) -> None:
    engine = make_engine(3)
    layer = engine.module.blocks[0].up
    with pytest.raises(UsageError, match=r"blocks\.0\.up\.weight.*modifier_rank"), GatheredParameters([layer.weight]):
        if only_rank in (None, engine.global_rank):
            layer.weight.data[:, :1].add_(1.0)  # in the parts of both ranks
    with GatheredParameters([layer.weight, layer.bias]):
        pass  # usable afterwards
    backward(engine, token_batches(1, 8)[0])
    engine.step()


@pytest.mark.parametrize("only_rank", [None, 0, 1])
def test_an_edit_that_would_be_lost_is_refused_on_every_rank(only_rank: int | None) -> None:
    run_ranks(2, edit_without_modifier, only_rank)


def gather_in_odd_ways() -> None:
    engine = make_engine(3)
    model = engine.module
    with GatheredParameters(model.parameters()), GatheredParameters(model.embed.weight):
        assert model.embed.weight.sum().isfinite()
        with torch.no_grad():
            model(token_batches(1, 4)[0])  # a forward inside does not release what the block holds
        assert all(param.sum().isfinite() for param in model.parameters())
    with GatheredParameters([]), GatheredParameters(None), GatheredParameters(nn.Parameter(torch.ones(2))):
        pass
    with GatheredParameters(model.embed.weight, enabled=False):
        assert type(model.embed.weight) is not nn.Parameter
    try:
        with GatheredParameters(list(model.parameters())):
            raise ValueError("of the user")
    except ValueError:
        pass
    backward(engine, token_batches(1, 8)[0])
    engine.step()


def test_gathering_nests_and_survives_exceptions() -> None:
    run_ranks(2, gather_in_odd_ways)


def ask_of_strangers() -> None:
    stranger = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match="belongs to no engine"):
        safe_get_full_fp32_param(stranger)
    model = make_gpt()
    model.blocks[0].requires_grad_(False)
    engine, *_ = zerolith.initialize(model=model, config=zero_config(2))
    frozen = engine.module.blocks[0].up.weight
    assert safe_get_full_fp32_param(frozen) is None
    assert safe_get_full_grad(frozen) is None
    with pytest.raises(UsageError, match="not trained"):
        safe_set_full_grad(frozen, torch.zeros_like(frozen))
    with pytest.raises(UsageError, match="shape"):
        safe_set_full_fp32_param(engine.module.blocks[1].up.weight, torch.zeros(3))


def test_parameters_of_no_engine_and_frozen_ones_are_told_apart() -> None:
    run_ranks(1, ask_of_strangers)


def edit_then_set(stage: int, how: str) -> None:
    engine = make_engine(stage, bf16={"enabled": True})
    first, second = engine.module.blocks[0].qkv.weight, engine.module.blocks[0].out.weight
    assert engine._sharded.place_of(first).section is engine._sharded.place_of(second).section
    if how == "set before":
        local = safe_get_local_fp32_param(second)
        safe_set_local_fp32_param(second, torch.full_like(local, 5.0))
    with torch.no_grad():
        first.copy_(torch.full_like(first, 3.0))
    if how == "set after":
        safe_set_full_fp32_param(second, torch.full(second.shape, 5.0))
    elif how == "gathered after":
        with GatheredParameters(second, modifier_rank=0):
            second.data.fill_(5.0)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = 0.0
    backward(engine, token_batches(1, 8)[0])
    engine.step()
    for param, value in ((first, 3.0), (second, 5.0)):
        whole = safe_get_full_fp32_param(param)
        assert torch.equal(whole, torch.full_like(whole, value))


@pytest.mark.parametrize("how", ["set before", "set after", "gathered after"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_edit_is_kept_whatever_is_set_beside_it(stage: int, how: str) -> None:
    run_ranks(2, edit_then_set, stage, how)


def set_large_gradients(stage: int) -> None:
    engine = make_engine(stage, fp16={"enabled": True, "initial_scale_power": 8})
    param = next(engine.module.parameters())
    backward(engine, token_batches(1, 8)[0])
    safe_set_full_grad(param, torch.full(param.shape, 1000.0, dtype=torch.float16))
    assert torch.equal(safe_get_full_grad(param), torch.full(param.shape, 1000.0))
    engine.step()
    assert engine.was_step_applied()


@STAGES
def test_a_gradient_is_set_in_enough_bits(stage: int) -> None:
    run_ranks(2, set_large_gradients, stage)


def ask_for_states_that_are_not_there(stage: int) -> None:
    engine = make_engine(stage)
    param = next(param for param in engine.module.parameters() if param.dim() == 1)  # on one rank alone
    value = torch.ones(param.shape)
    for call in (
        lambda: safe_get_full_optimizer_state(param, "momentum_buffer"),
        lambda: safe_set_full_optimizer_state(param, value, "momentum_buffer"),
    ):
        with pytest.raises(UsageError, match="has no optimizer state 'momentum_buffer'"):
            call()
    backward(engine, token_batches(1, 8)[0])
    engine.step()
    assert safe_get_full_optimizer_state(param, "momentum_buffer").shape == param.shape
    with pytest.raises(UsageError, match="has no optimizer state 'exp_avg'; it has: momentum_buffer"):
        safe_get_full_optimizer_state(param, "exp_avg")


@STAGES
def test_a_state_that_is_not_there_is_refused_on_every_rank(stage: int) -> None:
    run_ranks(2, ask_for_states_that_are_not_there, stage)


def read_after_no_sync(stage: int) -> None:
    engine = make_engine(stage, gradient_accumulation_steps=2)
    param = engine.module.head.weight
    with engine.no_sync():
        x = token_batches(1, 8)[0].chunk(2)[engine.global_rank]
        loss = engine(x) if engine.global_rank == 0 else engine(x) * 0 + engine.module.embed.weight.sum() * 0
        engine.backward(loss)
    assert safe_get_full_grad(param) is None
    backward(engine, token_batches(1, 8)[0])
    assert safe_get_full_grad(param) is not None


@STAGES
def test_a_gradient_that_is_not_reduced_is_none_on_every_rank(stage: int) -> None:
    run_ranks(2, read_after_no_sync, stage)


def gather_nonsense() -> None:
    engine = make_engine(3)
    for given, words in (
        (engine.module.named_parameters(), "a tuple is none"),
        (engine.module.state_dict(), "a str is none"),
        ("weight", "a str is none"),
    ):
        with pytest.raises(UsageError, match=words):
            GatheredParameters(given)
    with pytest.raises(UsageError, match="modifier_rank 7 is none of 2 ranks"):
        GatheredParameters(engine.module.parameters(), modifier_rank=7)


def test_what_is_no_parameter_or_no_rank_is_refused() -> None:
    run_ranks(2, gather_nonsense)
