"""The same numbers as plain PyTorch, and the same bits whatever is sharded, cut, fetched ahead or overlapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from models import (
    GPT,
    Trained,
    differing,
    error_between,
    make_gpt,
    sgd,
    start_engine,
    token_batches,
    train_plain,
    train_zero,
    zero_config,
)
from zerolith import wrap
from zerolith.comm import Comm, communicator
from zerolith.gradients import Term
from zerolith.section import Section

STAGES = (0, 1, 2, 3)
MICRO = 2
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 128.0}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **PRECISIONS,
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16, fp32 on the wire": {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
    "bf16, accumulated in bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "fp32, bf16 on the wire": {"communication_data_type": "bf16"},
}


def small_gpt() -> GPT:
    return make_gpt(width=24, layers=2, vocab=40)


def batches(steps: int, micro_batches: int) -> Tensor:
    return token_batches(steps, micro_batches * MICRO, time=9, vocab=40)


def config_for(stage: int, *, gas: int = 1, clip: float = 0.0, **overrides: Any) -> dict[str, Any]:
    return zero_config(
        stage,
        train_micro_batch_size_per_gpu=MICRO,
        gradient_accumulation_steps=gas,
        gradient_clipping=clip,
        **overrides,
    )


def same_bits(got: Trained, expected: Trained) -> list[str]:
    """What differs: names of weights, "losses", "norms"."""
    parts = [name for name in ("losses", "norms") if getattr(got, name) != getattr(expected, name)]
    return parts + differing(got.weights, expected.weights)


# --- plain PyTorch ----------------------------------------------------------------------------------


def worst_error_by_stage(gas: int, clip: float, micro_batches: int) -> dict[int, float]:
    data = batches(4, micro_batches)
    _, expected = train_plain(small_gpt(), data, sgd, clip=clip)
    return {
        stage: error_between(
            train_zero(small_gpt(), data, config_for(stage, gas=gas, clip=clip), sgd).weights, expected
        )
        for stage in STAGES
    }


@pytest.mark.parametrize(("world", "gas", "clip"), [(1, 2, 0.0), (2, 1, 0.0), (2, 3, 0.5), (3, 1, 0.5), (4, 2, 0.0)])
def test_weights_under_sgd_with_momentum_are_those_of_one_process(world: int, gas: int, clip: float) -> None:
    for errors in run_ranks(world, worst_error_by_stage, gas, clip, world * gas):
        assert all(error < 1e-5 for error in errors.values()), errors


def bf16_errors() -> dict[int, float]:
    """Against bf16 weights and gradients with fp32 masters, spelled out. Terms are summed in rank order in fp32."""
    model, data = small_gpt(), batches(4, 2)
    masters = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1, momentum=0.9, weight_decay=0.01)
    model.to(torch.bfloat16)
    for batch in data:
        terms = []
        for piece in batch.split(MICRO):
            model.zero_grad()
            model(piece).backward()
            terms.append({name: param.grad.float() for name, param in model.named_parameters()})
        for name, master in masters.items():
            master.grad = (terms[0][name] + terms[1][name]) / 2
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(masters[name])
    expected = {name: param.detach() for name, param in model.named_parameters()}
    config = {stage: config_for(stage, **PRECISIONS["bf16"]) for stage in STAGES}
    return {
        stage: error_between(train_zero(small_gpt(), data, config[stage], sgd).weights, expected) for stage in STAGES
    }


def test_bf16_is_bf16_weights_and_gradients_with_fp32_masters_bit_for_bit() -> None:
    for errors in run_ranks(2, bf16_errors):
        assert errors == dict.fromkeys(STAGES, 0.0)


# --- stages -----------------------------------------------------------------------------------------


def differences_between_stages(
    precision: str, gas: int, reproducible: bool, micro_batches: int
) -> dict[int, list[str]]:
    data = batches(3, micro_batches)
    trained = {
        stage: train_zero(
            small_gpt(),
            data,
            config_for(stage, gas=gas, clip=0.5, reproducible=reproducible, **VARIANTS[precision]),
        )
        for stage in STAGES
    }
    assert min(trained[0].norms) > 0.5, "nothing was clipped"
    assert trained[0].losses[-1] < trained[0].losses[0], "nothing was learned"
    return {stage: same_bits(trained[stage], trained[0]) for stage in STAGES[1:]}


@pytest.mark.parametrize("precision", VARIANTS)
@pytest.mark.parametrize(("world", "gas", "reproducible"), [(3, 1, False), (2, 3, True)], ids=["3", "2-accumulating"])
def test_every_stage_gives_the_same_bits_with_clipping(
    world: int, gas: int, reproducible: bool, precision: str
) -> None:
    for differences in run_ranks(world, differences_between_stages, precision, gas, reproducible, world * gas):
        assert differences == {stage: [] for stage in STAGES[1:]}


# --- world sizes ------------------------------------------------------------------------------------


def reproducible_run(precision: str, world: int) -> list[Trained]:
    data = batches(3, 4)
    return [
        train_zero(
            small_gpt(),
            data,
            config_for(stage, gas=4 // world, clip=0.5, reproducible=True, **PRECISIONS[precision]),
        )
        for stage in (0, 3)
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reproducible_runs_give_the_same_bits_on_1_2_and_4_ranks(precision: str) -> None:
    alone = run_ranks(1, reproducible_run, precision, 1)[0][0]
    for world in (2, 4):
        for rank, runs in enumerate(run_ranks(world, reproducible_run, precision, world)):
            for run in runs:
                assert differing(run.weights, alone.weights) == []
                assert run.norms == alone.norms
                assert run.losses == alone.losses[rank::world]


# --- how it is cut and when it moves ----------------------------------------------------------------


WAYS: dict[str, dict[str, Any]] = {
    "tiny buckets": {"reduce_bucket_size": 700},
    "one bucket": {"reduce_bucket_size": 10**9},
    "no prefetch": {"stage3_prefetch_bucket_size": 0},
    "prefetch": {"stage3_prefetch_bucket_size": 1},
    "overlap": {"overlap_comm": True},
    "no overlap": {"overlap_comm": False},
    "one unit": {"stage3_param_persistence_threshold": 10**9},
    "many units": {"stage3_param_persistence_threshold": 1},
}


def differences_between_ways(stage: int, precision: str) -> dict[str, list[str]]:
    data = batches(3, 2)
    settings = {"clip": 0.5, **PRECISIONS[precision]}
    expected = train_zero(small_gpt(), data, config_for(stage, **settings))
    return {
        way: same_bits(train_zero(small_gpt(), data, config_for(stage, zero_optimization=zero, **settings)), expected)
        for way, zero in WAYS.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_units_prefetch_and_overlap_do_not_change_a_bit(stage: int, precision: str) -> None:
    for differences in run_ranks(2, differences_between_ways, stage, precision):
        assert differences == {way: [] for way in WAYS}


def differences_of_large_tensors(stage: int, precision: str, gas: int) -> list[list[str]]:
    """With every tensor in a section of its own, so that gradients are sent as autograd made them."""
    model = make_gpt(width=32, layers=2, vocab=48)  # sizes that fill a section on two ranks
    data = token_batches(3, 2 * gas * MICRO, time=9, vocab=48)
    config = config_for(stage, gas=gas, clip=0.5, **PRECISIONS[precision])
    expected = train_zero(copy.deepcopy(model), data, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrap, "LARGE", 1)
        borrowed = spy_on_borrowed(patch)
        alone = train_zero(copy.deepcopy(model), data, config)
    assert borrowed, "no gradient was sent as it is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "KEPT_BYTES", 1024)  # and in turns
        in_turns = train_zero(copy.deepcopy(model), data, config)
    return [same_bits(alone, expected), same_bits(in_turns, expected)]


def spy_on_borrowed(patch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    borrow = Term.borrow

    def spy(section: Section, comm: Comm, grad: Tensor) -> Term:
        names.append(section.name)
        return borrow(section, comm, grad)

    patch.setattr(Term, "borrow", spy)
    return names


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "gas"), [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_large_tensors_alone_and_reductions_in_turns_do_not_change_a_bit(stage: int, gas: int, precision: str) -> None:
    for differences in run_ranks(2, differences_of_large_tensors, stage, precision, gas):
        assert differences == [[], []]


# --- two engines ------------------------------------------------------------------------------------


def two_engines(stages: tuple[int, int]) -> list[list[str]]:
    models, data = [small_gpt(), make_gpt(seed=5, width=16, layers=1, vocab=40)], batches(3, 2)
    alone = [train_zero(model, data, config_for(stage)) for model, stage in zip(models, stages, strict=True)]
    engines = [start_engine(model, config_for(stage)) for model, stage in zip(models, stages, strict=True)]
    rank = engines[0].global_rank
    losses: list[list[float]] = [[], []]
    for batch in data:
        piece = batch.split(MICRO)[rank]
        outputs = [engine(piece) for engine in engines]
        for engine, loss, seen in zip(engines, outputs, losses, strict=True):
            seen.append(loss.item())
            engine.backward(loss)
        for engine in reversed(engines):
            engine.step()
    return [[] if seen == one.losses else [str(seen), str(one.losses)] for seen, one in zip(losses, alone, strict=True)]


@pytest.mark.parametrize("stages", [(3, 3), (3, 1), (0, 2)])
def test_two_engines_in_one_process_train_as_if_alone(stages: tuple[int, int]) -> None:
    assert run_ranks(2, two_engines, stages) == [[[], []]] * 2


def one_loss_of_two_engines(stages: tuple[int, int]) -> float:
    """A generator's output goes through a critic; both learn from one backward."""
    torch.manual_seed(0)
    both = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)])
    data = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(3))

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = both

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](torch.tanh(self.parts[0](x.flatten(0, -2)))).square().mean()

    _, expected = train_plain(Chain(), data, sgd)
    engines = [start_engine(part, config_for(stage), sgd) for part, stage in zip(both, stages, strict=True)]
    for batch in data:
        loss = engines[1](torch.tanh(engines[0](batch[engines[0].global_rank]))).square().mean()
        loss.backward()
        for engine in engines:
            engine.step()
    got = {}
    for number, engine in enumerate(engines):
        for unit in engine._sharded.units:
            unit.gather()
        got |= {f"parts.{number}.{name}": param.detach() for name, param in engine.module.named_parameters()}
    return error_between(got, expected)


@pytest.mark.parametrize("stages", [(3, 3), (0, 3), (2, 1)])
def test_one_backward_through_two_engines_trains_both(stages: tuple[int, int]) -> None:
    for error in run_ranks(2, one_loss_of_two_engines, stages):
        assert error < 1e-5
