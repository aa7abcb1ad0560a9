"""Optimizers and schedulers by their names in the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plain import MICRO, config_for, error_between, make_batches, make_mlp, start, train_engine
from zerolith.errors import ConfigError
from zerolith.optim import build_optimizer, build_scheduler


def build(kind: str, **params: Any) -> torch.optim.Optimizer:
    return build_optimizer(kind, params, [nn.Parameter(torch.ones(3))], nn.Module())


BUILT: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("Adam", {}, "AdamW", {"weight_decay": 0.0, "fused": True}),
    ("Adam", {"weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
    ("Adam", {"adam_w_mode": True, "torch_adam": True}, "AdamW", {"weight_decay": 0.0}),
    ("Adam", {"adam_w_mode": False, "weight_decay": 0.1}, "Adam", {"weight_decay": 0.1, "fused": True}),
    ("AdamW", {}, "AdamW", {"weight_decay": 0.0, "fused": True}),
    ("AdamW", {"adam_w_mode": False}, "AdamW", {"weight_decay": 0.0}),
    ("adamw", {"lr": 1.0, "bias_correction": True}, "AdamW", {"lr": 1.0}),
    ("SGD", {"lr": 0.1, "momentum": 0.5}, "SGD", {"lr": 0.1, "momentum": 0.5, "fused": True}),
    ("SGD", {"lr": 0.1, "foreach": True}, "SGD", {"foreach": True, "fused": None}),
    ("RMSprop", {"alpha": 0.5}, "RMSprop", {"alpha": 0.5}),
    ("adagrad", {"lr": 0.1}, "Adagrad", {"lr": 0.1, "fused": True}),
]


@pytest.mark.parametrize(("kind", "params", "expected", "options"), BUILT)
def test_a_name_builds_the_torch_class_with_these_options(
    kind: str, params: dict[str, Any], expected: str, options: dict[str, Any]
) -> None:
    optimizer = build(kind, **params)
    assert type(optimizer) is getattr(torch.optim, expected)
    for name, value in options.items():
        assert optimizer.param_groups[0][name] == value, name


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("AdmaW", {}, ["optimizer.type", "'AdmaW'", "did you mean 'AdamW'"]),
    ("OneBitAdam", {}, ["optimizer.type", "'OneBitAdam'"]),
    ("Optimizer", {}, ["optimizer.type"]),
    ("SGD", {"lr": 0.1, "momentun": 0.9}, ["optimizer.params.momentun", "did you mean 'momentum'", "nesterov"]),
    ("SGD", {"lr": 0.1, "adam_w_mode": True}, ["optimizer.params.adam_w_mode", "SGD"]),
    ("AdamW", {"beta": [0.9, 0.99]}, ["optimizer.params.beta", "'betas'", "weight_decay"]),
    ("AdamW", {"lr": -1.0}, ["optimizer.params", "learning rate"]),
    ("Adam", {"bias_correction": False}, ["optimizer.params.bias_correction", "always"]),
]


@pytest.mark.parametrize(("kind", "params", "words"), REFUSED)
def test_what_cannot_be_built_is_refused_with_what_could(kind: str, params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(kind, **params)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configured_optimizer_trains_as_the_same_one_given() -> None:
    batches = make_batches(3, MICRO)
    configured = config_for(1, optimizer={"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}})
    given = start(config_for(1), make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True))
    got, expected = train_engine(start(configured), batches), train_engine(given, batches)
    assert error_between(got.weights, expected.weights) < 1e-6
    assert got.norms == pytest.approx(expected.norms, rel=1e-6)


def test_a_scheduler_is_a_class_of_torch_by_its_name() -> None:
    optimizer = build("SGD", lr=1.0)
    scheduler = build_scheduler("StepLR", {"step_size": 2, "gamma": 0.5}, optimizer)
    assert type(scheduler) is torch.optim.lr_scheduler.StepLR
    assert scheduler.optimizer is optimizer


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("StepLr", {}, ["scheduler.type", "'StepLR'"]),
        ("LRScheduler", {}, ["scheduler.type"]),
        ("StepLR", {"stepsize": 1}, ["scheduler.params.stepsize", "'step_size'", "gamma"]),
        ("StepLR", {}, ["scheduler.params", "step_size"]),
    ],
)
def test_a_scheduler_that_cannot_be_built_is_refused_with_what_could(
    kind: str, params: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(kind, params, build("SGD", lr=1.0))
    for word in words:
        assert word in str(caught.value)


def test_frozen_parameters_are_left_out_of_a_configured_optimizer() -> None:
    model = make_mlp()
    model[0].weight.requires_grad_(False)
    engine = start(config_for(1, optimizer={"type": "SGD", "params": {"lr": 0.1}}), model=model)
    frozen = engine.module[0].weight
    before = frozen.detach().clone()
    stepped = sum(p.numel() for group in engine.basic_optimizer.param_groups for p in group["params"])
    (batch,) = make_batches(1, MICRO)
    trained = train_engine(engine, [batch])
    assert torch.equal(trained.weights["0.weight"], before)
    assert not torch.equal(trained.weights["2.weight"], model[2].weight)
    assert stepped < sum(-(-p.numel() // 256) * 256 for p in model.parameters())
