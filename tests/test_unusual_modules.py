"""Whatever a model does with its modules and parameters, it trains as in plain PyTorch, at every stage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks
from models import differing, error_between, sgd, start_engine, whole_weights, zero_config
from torch import Tensor, nn
from unusual import CASES, Chain, Compiled, ModuleOnOneRank, Output

STAGES = (0, 1, 2, 3)
STEPS = 5
TINY = 20  # elements from which on a module is a unit


def config_for(stage: int, **overrides: Any) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": TINY, **overrides.pop("zero_optimization", {})}
    return zero_config(stage, train_micro_batch_size_per_gpu=3, zero_optimization=zero, **overrides)


def inputs(world: int) -> Tensor:
    """(step, rank, sample, feature)"""
    return torch.randn(STEPS, world, 3, 8, generator=torch.Generator().manual_seed(7))


def loss_of(output: Any) -> Tensor:
    return output.value if isinstance(output, Output) else output


Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def train_alone(model: nn.Module, make_optimizer: Optimize, data: Tensor) -> dict[str, Tensor]:
    """Plain PyTorch; every rank's forward in turn."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    for step, by_rank in enumerate(data):
        if hasattr(model, "set_frozen"):
            model.set_frozen(step)
        for rank, x in enumerate(by_rank):
            (loss_of(model(x, step, rank)) / len(by_rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def train_sharded(model: nn.Module, make_optimizer: Optimize, data: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    engine = start_engine(model, config, make_optimizer)
    for step, by_rank in enumerate(data):
        if hasattr(engine.module, "set_frozen"):
            engine.module.set_frozen(step)
        loss = loss_of(engine(by_rank[engine.global_rank], step, engine.global_rank))
        engine.backward(loss)
        engine.step()
    weights = whole_weights(engine)
    engine.destroy()
    return weights


def compare_stages(make_model: Callable[[], nn.Module], stages: tuple[int, ...], make_optimizer: Optimize) -> list[str]:
    """What is wrong at which stage; empty if nothing is."""
    torch.manual_seed(0)
    model = make_model()
    data = inputs(torch.distributed.get_world_size())
    expected = train_alone(model, make_optimizer, data)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert error_between(expected, start) > 1e-3, "nothing was learned"
    complaints, first = [], None
    for stage in stages:
        got = train_sharded(model, make_optimizer, data, config_for(stage))
        if error_between(got, expected) > 1e-5:
            complaints.append(f"stage {stage} is off by {error_between(got, expected):.1e}")
        first = first or got
        complaints += [f"{name} has other bits at stage {stage}" for name in differing(got, first)]
    return complaints


@pytest.mark.parametrize("case", CASES)
def test_every_stage_trains_as_plain_pytorch(case: str) -> None:
    assert run_ranks(2, compare_stages, CASES[case], STAGES, sgd) == [[], []]
