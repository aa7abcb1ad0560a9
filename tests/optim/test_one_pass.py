"""torch's optimizers stepped by our kernels: torch's numbers, states and options; the weights' dtype on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import zerolith.section
from harness import run_ranks
from models import PRECISIONS, assert_same, make_gpt, token_batches, train_zero, zero_config
from plain import MICRO, STAGES, config_for, error_between, make_batches, start, train_engine
from zerolith.optim import build_optimizer, lion, one_pass, original

CASES: list[tuple[str, type[Optimizer], dict[str, Any]]] = [
    ("AdamW", torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    ("Adam", torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    ("Lion", lion.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    ("Adagrad", torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    ("SGD", torch.optim.SGD, {"lr": 0.1}),
    ("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
]


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((700,), (3, 5), ())]


def step(optimizer: Optimizer, number: int) -> None:
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        param.grad = torch.sin(param.detach() * number)
    optimizer.step()


def same(first: Optimizer, second: Optimizer, *, tolerance: float) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=tolerance, atol=tolerance)
    for own, their in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(own, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_steps_are_those_of_torch_and_states_change_hands(
    name: str, kind: type[Optimizer], options: dict[str, Any]
) -> None:
    ours, theirs = one_pass.CLASSES[name](params(), **options), kind(params(), **options)
    assert isinstance(ours, kind)
    assert original(type(ours)) is kind
    for number in range(1, 5):
        step(ours, number)
        step(theirs, number)
        same(ours, theirs, tolerance=2e-6)
    back = kind(copy.deepcopy(theirs.param_groups[0]["params"]), **options)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    there = one_pass.CLASSES[name](copy.deepcopy(ours.param_groups[0]["params"]), **options)
    there.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (back, there, ours):
        step(optimizer, 5)
    same(back, ours, tolerance=4e-6)
    same(there, ours, tolerance=4e-6)


def test_a_parameter_without_a_gradient_stays() -> None:
    optimizer = one_pass.AdamW(params(), lr=0.1)
    step(optimizer, 1)
    first, second, third = optimizer.param_groups[0]["params"]
    second.grad = None
    before = [each.detach().clone() for each in (first, second, third)]
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, (first, second, third), strict=True)]
    assert moved == [True, False, True]
    assert [int(optimizer.state[each]["step"]) for each in (first, second, third)] == [2, 1, 2]


def test_what_the_kernels_do_not_know_is_stepped_by_torch() -> None:
    """An option that a loaded state dict brings, and masters of another dtype."""
    groups = [{"params": params()}, {"params": params(torch.float64)}]
    ours, theirs = one_pass.AdamW(copy.deepcopy(groups), lr=0.1), torch.optim.AdamW(copy.deepcopy(groups), lr=0.1)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["amsgrad"] = True
    ours.grad_factor = 0.5
    outs = {param: torch.empty_like(param, dtype=torch.bfloat16) for g in ours.param_groups for param in g["params"]}
    ours.outs = outs
    for number in range(1, 4):
        step(ours, number)
        for param in (param for group in theirs.param_groups for param in group["params"]):
            param.grad = torch.sin(param.detach() * number) * 0.5
        theirs.step()
    for own, their in zip(ours.param_groups, theirs.param_groups, strict=True):
        for param, expected in zip(own["params"], their["params"], strict=True):
            assert torch.equal(param, expected)
            assert torch.equal(outs[param], expected.bfloat16())
    assert "max_exp_avg_sq" in ours.state[ours.param_groups[0]["params"][0]]


def test_known_and_unknown_groups_are_stepped_once_each() -> None:
    ours = one_pass.AdamW([{"params": params()}, {"params": params(), "amsgrad": True}], lr=0.1)
    for number in range(1, 4):
        step(ours, number)
    steps = [int(ours.state[param]["step"]) for group in ours.param_groups for param in group["params"]]
    assert steps == [3] * 6


@pytest.mark.parametrize(
    ("kind", "options", "is_ours"),
    [
        ("Adam", {}, True),
        ("AdamW", {"lr": 0.1, "betas": [0.9, 0.95]}, True),
        ("Lion", {}, True),
        ("AdamW", {"amsgrad": True}, False),
        ("AdamW", {"foreach": True}, False),
        ("AdamW", {"fused": True}, False),
        ("SGD", {"lr": 0.1, "maximize": True}, False),
        ("RMSprop", {}, False),
    ],
)
def test_a_name_in_the_config_gives_ours_where_it_knows_the_options(
    kind: str, options: dict[str, Any], is_ours: bool
) -> None:
    optimizer = build_optimizer(kind, options, params(), nn.Module(), in_one_pass=True)
    assert isinstance(optimizer, one_pass.OnePass) is is_ours
    assert not isinstance(build_optimizer(kind, options, params(), nn.Module()), one_pass.OnePass)


def test_an_option_of_a_group_counts() -> None:
    groups = [{"params": params()}, {"params": params(), "amsgrad": True}]
    assert type(build_optimizer("AdamW", {}, groups, nn.Module(), in_one_pass=True)) is torch.optim.AdamW


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_weights_cast_on_the_way_are_the_masters_rounded(
    world: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(stage: int) -> list[Any]:
        config = zero_config(stage, gradient_clipping=0.5, **PRECISIONS[precision])
        return [*train_zero(make_gpt(), token_batches(4, 8), config)]

    def runs() -> list[Any]:
        return [run_ranks(world, lambda s=stage: body(s)) for stage in STAGES]

    cast = runs()
    monkeypatch.setattr(zerolith.section.Section, "cast_target", None)
    apart = runs()
    for run in [*cast[1:], *apart]:
        assert_same(run, cast[0])


def test_checkpoints_go_from_torchs_class_to_ours_and_back(tmp_path: Path) -> None:
    batches = make_batches(4, MICRO)
    named = {**config_for(2), "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1}}}

    def given(params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)

    whole = train_engine(start(named), batches)
    for number, (first, second) in enumerate(((given, None), (None, given))):
        engines = [start(config_for(2) if made else named, make_optimizer=made) for made in (first, second)]
        home = tmp_path / str(number)
        train_engine_to(engines[0], batches[:2], home)
        assert engines[1].load_checkpoint(home)[0] is not None
        resumed = train_engine(engines[1], batches[2:])
        assert error_between(resumed.weights, whole.weights) < 1e-5


def train_engine_to(engine: Any, batches: list[Any], home: Path) -> None:
    """Train, save, and be done."""
    destroy, engine.destroy = engine.destroy, lambda: None
    train_engine(engine, batches)
    engine.save_checkpoint(home)
    destroy()
