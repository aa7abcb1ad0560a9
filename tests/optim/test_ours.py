"""Lion, Lamb and Muon with AdamW: their formulas, spelled out, and every stage like one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    assert_close,
    assert_same_bits,
    config_for,
    make_batches,
    start,
    train_engine,
    train_plain,
)
from zerolith.errors import ConfigError
from zerolith.member import Granularity
from zerolith.optim.build import build_optimizer
from zerolith.optim.muon import Muon, split
from zerolith.zero import safe_get_full_optimizer_state


def lion(weight: Tensor, grads: list[Tensor], lr: float, decay: float) -> Tensor:
    momentum = torch.zeros_like(weight)
    for grad in grads:
        direction = torch.sign(0.9 * momentum + 0.1 * grad)
        weight = weight - lr * (direction + decay * weight)
        momentum = 0.99 * momentum + 0.01 * grad
    return weight


def lamb(weight: Tensor, grads: list[Tensor], lr: float, decay: float) -> Tensor:
    first = second = torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        first, second = 0.9 * first + 0.1 * grad, 0.99 * second + 0.01 * grad**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8) + decay * weight
        ratio = 1.0
        if weight.norm() > 0 and update.norm() > 0:
            ratio = min(max((weight.norm() / update.norm()).item(), 0.01), 10.0)
        weight = weight - lr * ratio * update
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start_at", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("formula", [lion, lamb])
def test_steps_are_those_of_the_formula(
    formula: Callable[[Tensor, list[Tensor], float, float], Tensor], start_at: float, decay: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = start_at * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    grads = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    param = nn.Parameter(weight.clone())
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": decay}
    optimizer = build_optimizer(formula.__name__, options, [param], nn.Module())
    for grad in grads:
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), formula(weight, grads, 0.01, decay), rtol=1e-6, atol=1e-9)


class Small(nn.Module):
    """An embedding tied to the head, hidden matrices, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 24)  # not an nn.Embedding: by its name
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.norm = nn.LayerNorm(24)
        self.out = nn.Linear(24, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.out(self.norm(x))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


OURS: list[tuple[str, dict[str, Any], float]] = [
    ("Lion", {"lr": 0.003, "weight_decay": 0.1}, 1e-5),
    ("Lamb", {"lr": 0.01, "weight_decay": 0.1}, 2e-5),
    ("Muon", {"muon_lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.01}, 2e-3),  # torch orthogonalises in bf16
]


@pytest.mark.parametrize(("kind", "options", "rtol"), OURS, ids=[row[0] for row in OURS])
@pytest.mark.parametrize("world", [2, 4])
def test_every_stage_trains_what_one_process_trains(
    kind: str, options: dict[str, Any], rtol: float, world: int
) -> None:
    batches = make_batches(5, 2 * world * MICRO)

    def body() -> None:
        model = small()
        expected = train_plain(model, batches, lambda params: make(model, kind, options, params))
        trained = []
        for stage in STAGES:
            config = config_for(stage, gas=2, reproducible=True, optimizer={"type": kind, "params": options})
            trained.append(train_engine(start(config, model=model), batches))
            assert_close(trained[-1], expected, rtol=rtol)
        for stage in STAGES[1:]:
            assert_same_bits(trained[stage], trained[0])

    run_ranks(world, body)


def make(model: nn.Module, kind: str, options: dict[str, Any], params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As `initialize` would, over a copy's parameters: names are found by position."""
    if kind != "Muon":
        return build_optimizer(kind, options, params, model)
    position = {id(param): index for index, param in enumerate(model.parameters())}
    groups = [
        {**group, "params": [params[position[id(param)]] for param in group["params"]]}
        for group in split(model, list(model.parameters()))
    ]
    return Muon(groups, **options)


def test_muon_has_the_hidden_matrices_and_nothing_else() -> None:
    model = small()
    names = {id(param): name for name, param in model.named_parameters()}
    groups = {
        group["use_muon"]: [names[id(param)] for param in group["params"]]
        for group in split(model, list(model.parameters()))
    }
    assert groups[True] == ["blocks.0.weight", "blocks.1.weight", "out.weight"]
    assert len(groups[False]) == len(names) - 3
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert [group["use_muon"] for group in split(tied, list(tied.parameters()))] == [False]
    kept = split(model, [{"params": list(model.parameters()), "use_muon": False, "lr": 3.0}])
    assert kept == [{"params": list(model.parameters()), "use_muon": False, "lr": 3.0}]
    cut = split(model, [{"params": list(model.blocks.parameters()), "lr": 3.0}])
    assert [(group["use_muon"], group["lr"], len(group["params"])) for group in cut] == [
        (True, 3.0, 2),
        (False, 3.0, 2),
    ]


def test_muon_moves_whole_tensors_only_for_its_own_matrices() -> None:
    def body() -> None:
        engine = start(config_for(2, optimizer={"type": "Muon", "params": {}}), model=small())
        by_name = {
            member.name: section.granularity for section in engine._sharded.sections for member in section.members
        }
        assert by_name["blocks.0.weight"] is Granularity.TENSOR
        assert by_name["embed.weight"] is by_name["blocks.0.bias"] is Granularity.ELEMENT
        engine.destroy()

    run_ranks(2, body)


def test_states_are_found_by_the_parameters_name() -> None:
    states = {
        "Adam": {"embed.weight": ("exp_avg", "exp_avg_sq"), "norm.bias": ("exp_avg", "exp_avg_sq")},
        "Lion": {"embed.weight": ("exp_avg",)},
        "Lamb": {"embed.weight": ("exp_avg", "exp_avg_sq")},
        "Muon": {"blocks.0.weight": ("momentum_buffer",), "embed.weight": ("exp_avg", "exp_avg_sq")},
        "Adafactor": {},
        "Adagrad": {"embed.weight": ("sum",)},
        "SGD": {"embed.weight": ("momentum_buffer",)},
    }

    def body() -> None:
        batch: Batch
        for kind, expected in states.items():
            options = {"lr": 0.01, "momentum": 0.9} if kind == "SGD" else {"lr": 0.01}
            engine = start(config_for(3, optimizer={"type": kind, "params": options}), model=small())
            for batch in make_batches(2, MICRO):
                engine.backward(nn.functional.mse_loss(engine(batch.x), batch.y))
                engine.step()
            params = dict(engine.module.named_parameters())
            for name, keys in expected.items():
                for key in keys:
                    state = safe_get_full_optimizer_state(params[name], key)
                    assert state.shape == params[name].shape
                    assert state.abs().sum() > 0
            engine.destroy()

    run_ranks(2, body)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("Lion", {"betas": [0.9, 1.0]}, "betas"),
    ("Lion", {"eps": 1e-8}, "optimizer.params.eps: Lion has no such parameter.*it takes lr, betas, weight_decay"),
    ("lamb", {"lr": -1}, "must not be negative"),
    ("Lamb", {"max_coeff": 0.1, "min_coeff": 1.0}, "min_coeff"),
    ("MUON", {"muon_lrs": 1.0}, "did you mean 'muon_lr'"),
    ("MUON", {"momentum": -1.0}, "momentum"),
    ("Lio", {}, "did you mean 'Lion'"),
]


@pytest.mark.parametrize(("kind", "params", "words"), WRONG)
def test_wrong_options_are_refused_with_the_right_ones(kind: str, params: dict[str, Any], words: str) -> None:
    model = small()
    with pytest.raises(ConfigError, match=words):
        build_optimizer(kind, params, list(model.parameters()), model)


def test_muon_of_the_library_wants_to_be_told_which_groups_are_its_own() -> None:
    with pytest.raises(ValueError, match="use_muon"):
        Muon(small().parameters())
    only = Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}])
    assert math.isclose(only.param_groups[0]["lr"], 1e-3)
