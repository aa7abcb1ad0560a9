"""Every optimizer of torch.optim, as the client made it, steps shards as it steps whole parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    Trained,
    assert_close,
    assert_same_bits,
    config_for,
    loss_of,
    make_batches,
    make_mlp,
    start,
    step_each,
    train_engine,
    train_plain,
    weights_of,
)
from zerolith.errors import OptimizerError

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Class, options, relative tolerance on weights after five steps. Where a sign or a root of a small number decides
# (Rprop, and Adam's relatives in their first steps), a last bit of the gradient shows more.
OPTIMIZERS: list[tuple[str, dict[str, Any], float]] = [
    ("Adadelta", {"lr": 1.0}, 2e-5),
    ("Adafactor", {"lr": 0.05}, 2e-5),
    ("Adagrad", {"lr": 0.1}, 1e-5),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}, 2e-5),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}, 2e-5),
    ("Adamax", {"lr": 0.01}, 2e-5),
    ("ASGD", {"lr": 0.1, "t0": 2}, 1e-5),
    ("Muon", {"lr": 0.05, "weight_decay": 0.01}, 2e-3),  # torch orthogonalises in bf16
    ("NAdam", {"lr": 0.01}, 2e-5),
    ("RAdam", {"lr": 0.01}, 1e-5),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}, 1e-4),
    ("Rprop", {"lr": 0.01}, 1e-4),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 1e-5),
]
EVERY_OPTIMIZER = pytest.mark.parametrize(("kind", "options", "rtol"), OPTIMIZERS, ids=[row[0] for row in OPTIMIZERS])
MATRICES_ONLY = ("Muon",)


def maker(kind: str, options: dict[str, Any]) -> Make:
    return lambda params: getattr(torch.optim, kind)(params, **options)


def test_every_class_of_torch_optim_is_in_the_table_or_refused() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert classes - {"Optimizer", "LBFGS", "SparseAdam"} == {row[0] for row in OPTIMIZERS}


@EVERY_OPTIMIZER
def test_two_ranks_at_every_stage_train_what_one_process_trains(
    kind: str, options: dict[str, Any], rtol: float
) -> None:
    model = make_mlp(bias=kind not in MATRICES_ONLY)
    batches = make_batches(5, 2 * 2 * MICRO)
    make = maker(kind, options)

    def body() -> None:
        expected = train_plain(model, batches, make)
        trained = []
        for stage in STAGES:
            config = config_for(stage, gas=2, reproducible=True)
            engine = start(config, model=model, make_optimizer=make)
            trained.append(train_engine(engine, batches))
            assert_close(trained[-1], expected, rtol=rtol)
        for stage in STAGES[1:]:
            assert_same_bits(trained[stage], trained[0])

    run_ranks(2, body)


def test_ranks_that_own_nothing_step_along_under_every_optimizer() -> None:
    batches = make_batches(3, 4 * MICRO)

    def body() -> None:
        for kind, options, rtol in OPTIMIZERS:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 3, bias=kind not in MATRICES_ONLY))  # one or two blocks, four ranks
            expected = train_plain(model, batches, maker(kind, options))
            for stage in (1, 3):
                engine = start(config_for(stage), model=model, make_optimizer=maker(kind, options))
                assert_close(train_engine(engine, batches), expected, rtol=rtol)

    run_ranks(4, body)


FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"foreach": True}),
    ("Adam", {"fused": True}),
    ("Adam", {"foreach": False}),
    ("AdamW", {"fused": True}),
    ("SGD", {"lr": 0.1, "fused": True}),
    ("SGD", {"lr": 0.1, "foreach": True}),
    ("Adagrad", {"fused": True}),
    ("Adam", {"maximize": True}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("RMSprop", {"foreach": True}),
    ("Adafactor", {"foreach": True}),
]


def test_foreach_fused_and_tensor_learning_rates_train_what_they_train_on_whole_parameters() -> None:
    batches = make_batches(3, 2 * MICRO)

    def body() -> None:
        for kind, options in FLAGS:
            make = maker(kind, options)
            expected = train_plain(make_mlp(), batches, make)
            for stage in (1, 3):
                engine = start(config_for(stage), make_optimizer=make)
                assert_close(train_engine(engine, batches), expected, rtol=1e-4)

    run_ranks(2, body)


@pytest.mark.parametrize(("kind", "reason"), [("LBFGS", "closure"), ("SparseAdam", "dense")])
def test_an_optimizer_that_cannot_be_sharded_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(OptimizerError, match=f"{kind} cannot be used: .*{reason}"):
        start(config_for(1), make_optimizer=maker(kind, {}))


# --- param groups -----------------------------------------------------------------------------------


def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Three groups whose tensors alternate in the model, with options of their own."""
    weights, biases = params[::2], params[1::2]
    return torch.optim.AdamW(
        [
            {"params": weights[1:], "lr": 0.02, "weight_decay": 0.1},
            {"params": biases, "lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.0},
            {"params": weights[:1], "eps": 1e-4},
        ],
        lr=0.005,
    )


def test_param_groups_keep_their_options_and_their_identity() -> None:
    batches = make_batches(4, 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, grouped)
        for stage in STAGES:
            made: list[torch.optim.Optimizer] = []
            groups: list[dict[str, Any]] = []

            def make(params: list[nn.Parameter], made=made, groups=groups) -> torch.optim.Optimizer:
                made.append(grouped(params))
                groups.extend(made[0].param_groups)
                return made[0]

            engine = start(config_for(stage), make_optimizer=make)
            assert engine.basic_optimizer is made[0]
            assert engine.optimizer.optimizer is made[0]
            assert engine.optimizer.param_groups is made[0].param_groups
            for mine, theirs in zip(engine.optimizer.param_groups, groups, strict=True):
                assert mine is theirs
            assert engine.get_lr() == [0.02, 0.01, 0.005]
            assert engine.get_mom() == [(0.9, 0.999), (0.8, 0.9), (0.9, 0.999)]
            assert_close(train_engine(engine, batches), expected, rtol=2e-5)

    run_ranks(2, body)


def test_a_learning_rate_set_by_hand_counts_from_the_next_step_on() -> None:
    batches = make_batches(4, MICRO)
    rates = [0.1, 0.0, 0.3, 0.05]

    def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=1.0)
        optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=next(left)))
        return optimizer

    left = iter(rates)
    expected = train_plain(make_mlp(), batches, sgd)
    left = iter(rates)
    engine = start(config_for(2), make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0))

    def set_then_step(engine: Any, optimizer: Any, micro_batches: Any) -> None:
        optimizer.param_groups[0]["lr"] = next(left)
        step_each(engine, optimizer, micro_batches)

    assert_close(train_engine(engine, batches, set_then_step), expected)


def test_a_group_added_after_initialize_is_refused() -> None:
    engine = start(config_for(1), make_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    group = {"params": [nn.Parameter(torch.zeros(2))]}
    with pytest.raises(RuntimeError, match="before it"):
        engine.optimizer.add_param_group(group)
    engine.basic_optimizer.add_param_group(group)
    (batch,) = make_batches(1, MICRO)
    with pytest.raises(OptimizerError, match="2 param groups and had 1"):
        train_engine(engine, [batch])


# --- parameters without a gradient ------------------------------------------------------------------


class Sometimes(nn.Module):
    """A model whose side branch runs for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = make_mlp(), make_mlp(seed=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + (self.side(x) if x[0, 0] > 0 else 0.0)


def batches_that_use_the_side_branch(signs: list[tuple[int, int]]) -> list[Batch]:
    """For each step, whether ranks 0 and 1 run the side branch."""
    batches = make_batches(len(signs), 2 * MICRO)
    for batch, (first, second) in zip(batches, signs, strict=True):
        batch.x[0, 0], batch.x[MICRO, 0] = float(first), float(second)
    return batches


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_parameters_without_a_gradient_keep_weights_momentum_and_step_count(kind: str) -> None:
    """Where parameters are sharded, all ranks must run the same modules; elsewhere one rank may skip some."""
    make = maker(kind, {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {}))
    alike = batches_that_use_the_side_branch([(1, 1), (-1, -1), (1, 1), (-1, -1), (1, 1)])
    apart = batches_that_use_the_side_branch([(1, 1), (-1, -1), (1, -1), (-1, -1), (-1, 1)])

    def body() -> None:
        for batches, stages in ((alike, STAGES), (apart, (0, 1, 2))):
            expected = train_micro_batches(Sometimes(), batches, make)
            for stage in stages:
                engine = start(config_for(stage), model=Sometimes(), make_optimizer=make)
                assert_close(train_engine(engine, batches), expected, rtol=2e-5)

    run_ranks(2, body)


def train_micro_batches(model: nn.Module, batches: list[Batch], make: Make) -> Trained:
    """As train_plain, with one backward for each micro-batch."""
    model = copy.deepcopy(model)
    optimizer = make(list(model.parameters()))
    norms = []
    for batch in batches:
        pieces = list(zip(batch.x.split(MICRO), batch.y.split(MICRO), strict=True))
        for piece in pieces:
            (loss_of(model, Batch(*piece)) / len(pieces)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(weights_of(model), norms, [True] * len(batches))
