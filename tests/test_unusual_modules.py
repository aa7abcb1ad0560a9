"""Whatever a model does with its modules and parameters, it trains as in plain PyTorch, at every stage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import differing, error_between, sgd, start_engine, whole_weights
from unusual import (
    CASES,
    Chain,
    Checkpointed,
    Compiled,
    ModuleOnOneRank,
    Optimize,
    config_for,
    inputs,
    loss_of,
    train_sharded,
)
from zerolith.errors import ShardedAccessError, UsageError
from zerolith.parameter import ShardedParameter

STAGES = (0, 1, 2, 3)


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


def compare_stages(make_model: Callable[[], nn.Module], stages: tuple[int, ...], make_optimizer: Optimize) -> list[str]:
    """What is wrong at which stage; empty if nothing is."""
    torch.manual_seed(0)
    model = make_model()
    data = inputs(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
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


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


@pytest.mark.parametrize("case", ["used in some steps", "never used", "frozen for a while"])
def test_a_parameter_without_gradient_keeps_value_momentum_and_step_count(case: str) -> None:
    """Under Adam a bias correction by another step count, or a decay in between, would show."""
    assert run_ranks(2, compare_stages, CASES[case], STAGES, adam) == [[], []]


def test_a_module_may_run_on_one_rank_only_where_forward_does_not_communicate() -> None:
    assert run_ranks(2, compare_stages, ModuleOnOneRank, (0, 1, 2), sgd) == [[], []]


@pytest.mark.parametrize(
    "case", ["used on one rank", "used twice", "external parameters", "shared, reentrant checkpoints"]
)
def test_on_four_ranks(case: str) -> None:
    assert run_ranks(4, compare_stages, CASES[case], STAGES, sgd) == [[]] * 4


@pytest.mark.parametrize("case", ["used in some steps", "external parameters", "reentrant checkpoint: inside"])
def test_on_one_rank(case: str) -> None:
    assert run_ranks(1, compare_stages, CASES[case], STAGES, sgd) == [[]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forwards_compiled_as_one_graph_train_the_same(backend: str) -> None:
    assert run_ranks(2, compare_stages, lambda: Compiled(backend), STAGES, sgd) == [[], []]


# --- who is trained ---------------------------------------------------------------------------------


def only_heads(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)


def test_trainable_parameters_outside_the_optimizer_stay_as_they_are() -> None:
    """In plain PyTorch, too; and their gradients take no memory here."""
    assert run_ranks(2, compare_stages, Chain, STAGES, only_heads) == [[], []]


def several_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim <= 1]
    return torch.optim.SGD(
        [{"params": others, "lr": 0.2}, {"params": matrices, "weight_decay": 0.1}], lr=0.05, momentum=0.9
    )


def test_param_groups_keep_their_own_settings() -> None:
    assert run_ranks(2, compare_stages, Chain, STAGES, several_groups) == [[], []]


def unfreeze_what_has_no_master(stage: int) -> str:
    model = Chain()
    model.layers[0].requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    engine = zerolith.initialize(model=model, optimizer=optimizer, config=config_for(stage))[0]
    x = inputs(2)[0][engine.global_rank]
    engine.backward(engine(x, 0, 0))
    engine.step()
    engine.module.layers[0].requires_grad_(True)
    with torch.no_grad():
        engine(x, 0, 0)  # evaluation is none of the optimizer's business
    with pytest.raises(UsageError) as caught:
        engine(x, 0, 0)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_unfreezing_what_no_optimizer_group_holds_is_refused_by_name(stage: int) -> None:
    for message in run_ranks(2, unfreeze_what_has_no_master, stage):
        assert "layers.0." in message
        assert "optimizer before initialize" in message


class Experts(nn.Module):
    """Each rank uses another of its parts: only right where all of them are gathered together."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *, chosen: int) -> Tensor:
        return x + self.experts[chosen](x)


class MixtureOfExperts(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(Experts() for _ in range(2))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for mixture in self.mixtures:
            x = mixture(x, chosen=(step + rank) % 3)
        return super().hidden(x, step, rank)


def experts_by_rank() -> list[float]:
    torch.manual_seed(0)
    model, data = MixtureOfExperts(), inputs(2)
    expected = train_alone(model, sgd, data)
    leaf = {"leaf_module": {"classes": ["Experts"]}}
    return [
        error_between(train_sharded(model, sgd, data, config_for(stage, zero_optimization=leaf)), expected)
        for stage in STAGES
    ]


def test_ranks_may_use_different_experts_of_a_leaf_module() -> None:
    for errors in run_ranks(2, experts_by_rank):
        assert all(error < 1e-5 for error in errors), errors


def double(grad: Tensor) -> Tensor:
    return 2 * grad


def hooks_on_parameters(stage: int) -> float:
    torch.manual_seed(0)
    model, data = Chain(), inputs(2)
    plain, hooked = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [sgd(each) for each in (plain, hooked)]
    for each in (plain, hooked):
        each.layers[0].inner.weight.register_hook(double)
    engine = zerolith.initialize(model=hooked, optimizer=optimizers[1], config=config_for(stage))[0]
    for step, by_rank in enumerate(data):
        for x in by_rank:
            (plain(x, step, 0) / 2).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        engine.backward(engine(by_rank[engine.global_rank], step, 0))
        engine.step()
    return error_between(whole_weights(engine), {name: param.detach() for name, param in plain.named_parameters()})


def test_hooks_that_the_client_put_on_parameters_still_work() -> None:
    for errors in run_ranks(2, lambda: [hooks_on_parameters(stage) for stage in STAGES]):
        assert all(error < 1e-5 for error in errors), errors


def gradient_of_inputs(stage: int) -> list[bool]:
    """An engine that trains nothing, as a frozen teacher or a reward model."""
    torch.manual_seed(0)
    model = Chain()
    x = inputs(2)[0][0].requires_grad_()
    (expected,) = torch.autograd.grad(model(x, 0, 0), x)
    config = config_for(stage)
    del config["optimizer"]
    engine = zerolith.initialize(model=copy.deepcopy(model), config=config)[0]
    seen = []
    for _ in range(3):
        (got,) = torch.autograd.grad(engine(x, 0, 0), x)
        seen.append(torch.equal(got, expected))
    return seen


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_optimizer_gives_gradients_of_its_inputs(stage: int) -> None:
    assert run_ranks(2, gradient_of_inputs, stage) == [[True] * 3] * 2


class Dtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dtypes = {"of_fp32": torch.float32, "of_fp64": torch.float64, "of_bf16": torch.bfloat16}
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8, dtype=dtype) for name, dtype in dtypes.items()})

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        for part in self.parts.values():
            x = torch.tanh(part(x.to(part.weight.dtype)))
        return x.float().square().mean()


def mixed_dtypes() -> list[str]:
    torch.manual_seed(0)
    model, data = Dtypes(), inputs(2)
    expected = train_alone(model, sgd, data)
    complaints, first = [], train_sharded(model, sgd, data, config_for(0))
    for stage in STAGES[1:]:
        got = train_sharded(model, sgd, data, config_for(stage))
        complaints += [f"{name} has other bits at stage {stage}" for name in differing(got, first)]
        assert {name: value.dtype for name, value in got.items()} == {
            name: value.dtype for name, value in expected.items()
        }
    # The bf16 module's fp32 master rounds less than plain PyTorch does; so do all gradients that went through it.
    if not error_between(first, expected) < 0.02:
        complaints.append(f"off by {error_between(first, expected)}")
    return complaints


def test_a_model_of_several_dtypes_keeps_them_at_every_stage() -> None:
    assert run_ranks(2, mixed_dtypes) == [[], []]


# --- how backward is called -------------------------------------------------------------------------


def run_habit(habit: str, stage: int) -> float:
    """The error of a training that calls backward in another way, with two losses a step."""
    torch.manual_seed(0)
    model, data = Chain(), inputs(4)
    expected = train_alone(model, sgd, data)
    gas = 1 if habit == "two forwards, one backward" else 2
    engine = start_engine(model, config_for(stage, gradient_accumulation_steps=gas), sgd)
    rank = engine.global_rank
    for step, by_rank in enumerate(data):
        HABITS[habit](engine, [by_rank[rank], by_rank[2 + rank]], step)
    got = whole_weights(engine)
    engine.destroy()
    return error_between(got, expected)


def one_backward(engine: Any, pieces: list[Tensor], step: int) -> None:
    loss = sum(engine(x, step, 0) for x in pieces) / 2
    engine.backward(loss)
    engine.step()


def forwards_first(engine: Any, pieces: list[Tensor], step: int) -> None:
    for loss in [engine(x, step, 0) for x in pieces]:
        engine.backward(loss)
        engine.step()


def one_graph_twice(engine: Any, pieces: list[Tensor], step: int) -> None:
    losses = [engine.module(x, step, 0) for x in pieces]
    total = losses[0] + 2 * losses[1]
    engine.backward(2 * total, retain_graph=True)
    engine.backward(-total - losses[1])
    engine.step()


def plain_backward(engine: Any, pieces: list[Tensor], step: int) -> None:
    for x in pieces:
        engine(x, step, 0).backward()
        engine.step()


def plain_backward_of_the_inner_module(engine: Any, pieces: list[Tensor], step: int) -> None:
    for x in pieces:
        engine.module(x, step, 0).backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def first_without_sync(engine: Any, pieces: list[Tensor], step: int) -> None:
    with engine.no_sync():
        engine.backward(engine(pieces[0], step, 0))
    engine.step()
    engine.backward(engine(pieces[1], step, 0))
    engine.step()


def all_without_sync(engine: Any, pieces: list[Tensor], step: int) -> None:
    for x in pieces:
        with engine.no_sync():
            engine.backward(engine(x, step, 0))
        engine.step()


HABITS: dict[str, Callable[[Any, list[Tensor], int], None]] = {
    "two forwards, one backward": one_backward,
    "two forwards, two backwards": forwards_first,
    "one graph twice": one_graph_twice,
    "plain backward": plain_backward,
    "inner module": plain_backward_of_the_inner_module,
    "no_sync, then sync": first_without_sync,
    "no_sync only": all_without_sync,
}


@pytest.mark.parametrize("habit", HABITS)
def test_every_way_to_call_backward_gives_the_mean_gradient(habit: str) -> None:
    for errors in run_ranks(2, lambda: [run_habit(habit, stage) for stage in STAGES]):
        assert all(error < 1e-5 for error in errors), errors


def checkpoints_without_sync(reentrant: bool) -> list[float]:
    errors = []
    for stage in STAGES:
        torch.manual_seed(0)
        model, data = Checkpointed("nested", reentrant=reentrant), inputs(4)
        expected = train_alone(model, sgd, data)
        engine = start_engine(model, config_for(stage, gradient_accumulation_steps=2), sgd)
        for step, by_rank in enumerate(data):
            first_without_sync(engine, [by_rank[engine.global_rank], by_rank[2 + engine.global_rank]], step)
        errors.append(error_between(whole_weights(engine), expected))
    return errors


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_and_no_sync_work_together(reentrant: bool) -> None:
    for errors in run_ranks(2, checkpoints_without_sync, reentrant):
        assert all(error < 1e-5 for error in errors), errors


# --- evaluation -------------------------------------------------------------------------------------


def evaluate_in_between(stage: int) -> list[str]:
    torch.manual_seed(0)
    model, data = CASES["attention"](), inputs(2)
    engine, undisturbed = (start_engine(model, config_for(stage), sgd) for _ in range(2))
    rank, complaints = engine.global_rank, []
    for step, by_rank in enumerate(data):
        x = by_rank[rank]
        for each in (engine, undisturbed):
            each.backward(each(x, step, rank))
            each.step()
        plain = CASES["attention"]()
        plain.load_state_dict(whole_weights(engine))
        for where, context in {
            "no_grad": torch.no_grad(),
            "inference": torch.inference_mode(),
            "grad": nullcontext(),
        }.items():
            for module in (engine, engine.module):
                module.eval()
                with context:
                    seen = module(x, step, rank).detach()
                module.train()
                if not torch.allclose(seen, plain.eval()(x, step, rank).detach(), rtol=1e-5):
                    complaints.append(f"{where} at step {step}: evaluated with other weights")
        with torch.no_grad():  # a part of the model, as generation uses it; and one after the other by hand
            part, expected = engine.module.layers[0](x[None]), plain.train().layers[0](x[None])
            part, expected = engine.module.layers[1](part), plain.layers[1](expected)
            if not torch.allclose(part, expected, rtol=1e-5, atol=1e-6):
                complaints.append(f"step {step}: a part computes with other weights")
        engine.backward(engine(x, step, rank))  # nothing is left of it
        engine.zero_grad()
    return complaints + differing(whole_weights(engine), whole_weights(undisturbed))


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_between_steps_sees_the_weights_and_leaves_training_alone(stage: int) -> None:
    assert run_ranks(2, evaluate_in_between, stage) == [[], []]


def copies(stage: int) -> list[str]:
    """A copy made while an engine trains the original, as for an average of weights or a target network."""
    torch.manual_seed(0)
    engine = start_engine(Chain(), config_for(stage), sgd)
    x = inputs(2)[0][engine.global_rank]
    engine.backward(engine(x, 0, 0))
    engine.step()
    duplicate = copy.deepcopy(engine.module)
    kept = {name: value.clone() for name, value in duplicate.state_dict().items()} if stage < 3 else {}
    engine.backward(engine(x, 0, 0))
    engine.step()
    if stage == 3:
        assert all(isinstance(param, ShardedParameter) for param in duplicate.parameters())
        with pytest.raises(ShardedAccessError):
            duplicate(x, 0, 0)
        return []
    duplicate(x, 0, 0).backward()
    assert all(param.grad is not None for param in duplicate.parameters())
    assert differing(dict(engine.module.named_parameters()), kept), "the original did not go on"
    return differing(duplicate.state_dict(), kept)


@pytest.mark.parametrize("stage", STAGES)
def test_a_deep_copy_of_the_model_is_nobody_elses(stage: int) -> None:
    assert run_ranks(2, copies, stage) == [[], []]
