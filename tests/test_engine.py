"""The engine as people drive it: what it answers, how it ends, and how schedulers and wrappers sit on it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedulers

import zerolith
from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    assert_close,
    assert_same_bits,
    config_for,
    loss_of,
    make_batches,
    make_mlp,
    my_micro_batches,
    start,
    step_each,
    train_engine,
    train_plain,
    weights_of,
)
from zerolith.errors import OptimizerError, UsageError


def sgd(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.Adam(params, lr=0.01)


EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)


# --- what it answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.3], ids=["no clipping", "clipping"])
def test_the_norm_is_a_float_that_equals_torchs_and_clipping_trains_the_same(clip: float) -> None:
    batches = make_batches(4, 2 * 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, sgd, clip=clip)
        assert not clip or min(expected.norms) > clip
        for stage in STAGES:
            engine = start(config_for(stage, gas=2, gradient_clipping=clip), make_optimizer=sgd)
            assert engine.get_global_grad_norm() is None
            got = train_engine(engine, batches)
            assert all(type(norm) is float for norm in got.norms)
            assert_close(got, expected)

    run_ranks(2, body)


def test_counters_and_configured_values() -> None:
    def body() -> None:
        config = config_for(2, gas=3, gradient_clipping=0.5, bf16={"enabled": True})
        engine = start(config, make_optimizer=adam)
        assert engine.train_batch_size() == 12
        assert engine.train_micro_batch_size_per_gpu() == 2
        assert engine.gradient_accumulation_steps() == 3
        assert engine.gradient_clipping() == 0.5
        assert engine.zero_optimization_stage() == 2
        assert engine.zero_optimization()
        assert engine.zero_optimization_partition_gradients()
        assert not engine.zero_optimization_partition_weights()
        assert engine.bfloat16_enabled()
        assert not engine.fp16_enabled()
        assert not engine.dynamic_loss_scale()
        assert engine.loss_scale() == 1.0
        assert engine.world_size == engine.dp_world_size == 2
        assert engine.global_rank == torch.distributed.get_rank()
        assert engine.device == torch.device("cpu")
        assert engine.get_lr() == [0.01]
        assert engine.get_mom() == [(0.9, 0.999)]
        seen = []
        for batch in make_batches(2, 12):
            for micro in my_micro_batches(batch):
                engine.backward(loss_of(engine, Batch(micro.x.bfloat16(), micro.y)))
                engine.step()
                seen.append((engine.micro_steps, engine.global_steps, engine.global_samples, engine.was_step_applied()))
        assert seen == [
            (1, 0, 0, False),
            (2, 0, 0, False),
            (3, 1, 12, True),
            (4, 1, 12, False),
            (5, 1, 12, False),
            (6, 2, 24, True),
        ]

    run_ranks(2, body)


def test_backward_returns_the_loss_as_it_counts() -> None:
    engine = start(config_for(1, gas=4), make_optimizer=sgd)
    (batch,) = make_batches(1, MICRO)
    loss = loss_of(engine, batch)
    assert engine.backward(loss).item() == pytest.approx(loss.item() / 4)
    loss = loss_of(engine, batch)
    assert engine.backward(loss, scale_wrt_gas=False).item() == loss.item()


@EVERY_STAGE
def test_an_engine_is_a_module_around_the_clients(stage: int) -> None:
    model = make_mlp()
    model.register_buffer("counter", torch.zeros(()))
    model.flavour = "plain"
    model.greet = lambda: "hello"
    engine = start(config_for(stage), model=model, make_optimizer=sgd)
    assert isinstance(engine, nn.Module)
    assert engine.flavour == "plain"
    assert engine.greet() == "hello"
    assert engine.counter is engine.module.counter
    assert list(dict(engine.named_parameters())) == [f"module.{name}" for name in dict(model.named_parameters())]
    assert engine.train() is engine
    assert engine.training
    assert engine.module.training
    assert engine.eval() is engine
    assert not engine.module[0].training
    assert engine.requires_grad_() is engine
    for missing in ("nothing", "_nothing"):
        with pytest.raises(AttributeError, match=missing):
            getattr(engine, missing)
    assert not hasattr(engine, "generate")
    engine.destroy()


@EVERY_STAGE
def test_the_inner_module_evaluates_by_itself(stage: int) -> None:
    (batch,) = make_batches(1, 3)
    engine = start(config_for(stage), make_optimizer=sgd)
    with torch.no_grad():
        expected = make_mlp()(batch.x)
        assert torch.equal(engine.module(batch.x), expected)
        assert torch.equal(engine(batch.x), expected)
    engine.destroy()


def test_several_engines_train_side_by_side_as_if_alone() -> None:
    batches = make_batches(3, 2 * MICRO)

    def body() -> None:
        expected = train_plain(make_mlp(), batches, sgd)
        engines = [start(config_for(stage), make_optimizer=sgd) for stage in STAGES]
        for batch in batches:
            for engine in engines:
                step_each(engine, engine.optimizer, list(my_micro_batches(batch)))
        for engine in engines:
            got = train_engine(engine, [])
            assert_close(got._replace(norms=expected.norms), expected)

    run_ranks(2, body)


def test_the_loss_may_join_two_engines() -> None:
    """As a generator and its critic do: one backward runs through both."""
    batches = make_batches(3, MICRO)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = make_mlp(), nn.Sequential(nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    torch.manual_seed(5)
    both = Both()
    expected = train_plain(both, batches, sgd)
    for stage in STAGES:
        model = copy.deepcopy(both)
        first = zerolith.initialize(model=model.first, optimizer=sgd, config=config_for(stage))[0]
        second = zerolith.initialize(model=model.second, optimizer=sgd, config=config_for(stage))[0]
        for batch in batches:
            nn.functional.mse_loss(second(first(batch.x)), batch.y).backward()
            first.step()
            second.step()
        for engine in (first, second):
            for unit in engine._sharded.units:
                unit.gather()
        got = weights_of(model)
        for name, weight in expected.weights.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


# --- its end ----------------------------------------------------------------------------------------


def hooks_of(model: nn.Module, params: list[nn.Parameter]) -> int:
    """Hooks of any kind on modules and on the parameters that the model was given with."""
    names = [name for name in vars(nn.Module()) if "hooks" in name and "always" not in name and "kwargs" not in name]
    total = sum(len(getattr(module, name)) for module in model.modules() for name in names)
    for param in params:
        total += len(param._backward_hooks or ()) + len(getattr(param, "_post_accumulate_grad_hooks", None) or ())
    return total


def live_bytes() -> int:
    """Of the storages that tensors in this process keep."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@EVERY_STAGE
def test_destroy_leaves_the_model_and_its_weights_and_nothing_else(stage: int) -> None:
    batches = make_batches(2, MICRO)
    model = make_mlp()
    optimizer = adam(list(model.parameters()))
    params = list(model.parameters())
    num_hooks, baseline = hooks_of(model, params), live_bytes()
    engine = zerolith.initialize(model=model, optimizer=optimizer, config=config_for(stage))[0]
    for batch in batches:
        step_each(engine, engine.optimizer, list(my_micro_batches(batch)))
    died = [weakref.ref(engine), weakref.ref(engine.optimizer), weakref.ref(engine._partitioned)]
    engine.destroy()
    assert hooks_of(model, params) == num_hooks
    assert not optimizer.state
    assert not optimizer._optimizer_step_pre_hooks
    for mine, theirs in zip(optimizer.param_groups[0]["params"], params, strict=True):
        assert mine is theirs
    if stage < 3:
        blocks = sum(-(-param.numel() // 256) for param in params)  # weights now rest in whole blocks
        growth = 4 * 256 * blocks - 4 * sum(param.numel() for param in params)
        assert live_bytes() <= baseline + growth + 4 * len(params)  # a scalar for each parameter may be left
    del engine
    gc.collect()
    assert [reference() for reference in died] == [None] * 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_engines_made_and_destroyed_again_and_again_on_one_model_do_not_grow(stage: int) -> None:
    batches = make_batches(5, MICRO)
    expected_model = make_mlp()
    model = make_mlp()
    sizes = []
    for batch in batches:
        got = train_one(model, batch, stage)
        expected_model = train_one_plainly(expected_model, batch)
        for name, weight in weights_of(expected_model).items():
            torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)
        sizes.append((live_bytes(), hooks_of(model, list(model.parameters()))))
    assert sizes[1:] == [sizes[1]] * 4


def train_one(model: nn.Module, batch: Batch, stage: int) -> dict[str, torch.Tensor]:
    engine = zerolith.initialize(model=model, optimizer=adam, config=config_for(stage))[0]
    step_each(engine, engine.optimizer, [batch])
    engine.destroy()
    return weights_of(model)


def train_one_plainly(model: nn.Module, batch: Batch) -> nn.Module:
    optimizer = adam(list(model.parameters()))
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("how", ["destroy", "drop"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_afterwards_model_and_optimizer_go_on_in_plain_pytorch(stage: int, how: str) -> None:
    batches = make_batches(3, MICRO)
    model = make_mlp()
    given = sgd(list(model.parameters()))
    expected = train_plain(model, batches, lambda params: optim.SGD(params, lr=0.1))
    given.param_groups[0]["momentum"] = 0.0
    engine = zerolith.initialize(model=model, optimizer=given, config=config_for(stage))[0]
    step_each(engine, engine.optimizer, [batches[0]])
    if how == "destroy":
        engine.destroy()
    del engine
    gc.collect()
    for batch in batches[1:]:
        loss_of(model, batch).backward()
        given.step()
        given.zero_grad()
    got = weights_of(model)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def test_a_second_engine_on_a_model_in_use_is_refused_and_the_first_trains_on() -> None:
    batches = make_batches(2, MICRO)
    for stage in STAGES:
        model = make_mlp()
        engine = zerolith.initialize(model=model, optimizer=sgd, config=config_for(stage))[0]
        step_each(engine, engine.optimizer, [batches[0]])
        with pytest.raises(UsageError, match=r"belongs to another engine already; call destroy\(\)"):
            zerolith.initialize(model=model, optimizer=sgd, config=config_for(stage))
        expected = train_plain(make_mlp(), batches, sgd)
        got = train_engine(engine, batches[1:])
        assert_close(got._replace(norms=expected.norms), expected)


@EVERY_STAGE
def test_the_returned_optimizer_alone_keeps_the_engine_at_work(stage: int) -> None:
    """Some clients keep the model and the optimizer, and drop the engine."""
    batches = make_batches(2, MICRO)
    model = make_mlp()
    optimizer = zerolith.initialize(model=model, optimizer=sgd, config=config_for(stage))[1]
    gc.collect()
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        got = model(batches[0].x)
    trained = make_mlp()
    trained.load_state_dict(train_plain(make_mlp(), batches, sgd).weights)
    torch.testing.assert_close(got, trained(batches[0].x), rtol=1e-5, atol=1e-6)


# --- schedulers -------------------------------------------------------------------------------------


def decay(optimizer: optim.Optimizer) -> Any:
    return schedulers.StepLR(optimizer, step_size=1, gamma=0.5)


def built_before(stage: int) -> Any:
    model = make_mlp()
    optimizer = sgd(list(model.parameters()))
    return zerolith.initialize(
        model=model, optimizer=optimizer, lr_scheduler=decay(optimizer), config=config_for(stage)
    )


def built_by_a_function(stage: int) -> Any:
    return zerolith.initialize(model=make_mlp(), optimizer=sgd, lr_scheduler=decay, config=config_for(stage))


def built_from_the_config(stage: int) -> Any:
    config = config_for(stage, scheduler={"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}})
    return zerolith.initialize(model=make_mlp(), optimizer=sgd, config=config)


def built_after(stage: int) -> Any:
    engine, optimizer, loader, _ = zerolith.initialize(model=make_mlp(), optimizer=sgd, config=config_for(stage))
    engine.lr_scheduler = decay(optimizer)
    return engine, optimizer, loader, engine.lr_scheduler


def stepped_by_the_client(stage: int) -> Any:
    engine, optimizer, loader, _ = zerolith.initialize(model=make_mlp(), optimizer=sgd, config=config_for(stage))
    return engine, optimizer, loader, decay(optimizer)


def stepped_by_the_client_and_built_before(stage: int) -> Any:
    model = make_mlp()
    optimizer = sgd(list(model.parameters()))
    scheduler = decay(optimizer)
    engine, optimizer, loader, _ = zerolith.initialize(model=model, optimizer=optimizer, config=config_for(stage))
    return engine, optimizer, loader, scheduler


WAYS: list[Callable[[int], Any]] = [
    built_before,
    built_by_a_function,
    built_from_the_config,
    built_after,
    stepped_by_the_client,
    stepped_by_the_client_and_built_before,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("stepper", ["engine", "optimizer"])
def test_a_scheduler_sets_the_learning_rate_of_the_next_step(way: Callable[[int], Any], stepper: str) -> None:
    batches = make_batches(4, MICRO)
    expected_model = make_mlp()
    expected_optimizer = sgd(list(expected_model.parameters()))
    expected_scheduler = decay(expected_optimizer)
    for batch in batches:
        loss_of(expected_model, batch).backward()
        expected_optimizer.step()
        expected_scheduler.step()
        expected_optimizer.zero_grad()
    for stage in STAGES:
        engine, _, _, scheduler = way(stage)
        rates = []

        def habit(engine: Any, optimizer: Any, micro: list[Batch], scheduler=scheduler, rates=rates) -> None:
            rates.append(engine.get_lr()[0])
            engine.backward(loss_of(engine, micro[0]))
            (engine if stepper == "engine" else optimizer).step()
            if "by_the_client" in way.__name__:
                scheduler.step()

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where a scheduler seems to step before its optimizer
            trained = train_engine(engine, batches, habit)
        assert rates == [0.1, 0.05, 0.025, 0.0125]
        for name, weight in weights_of(expected_model).items():
            torch.testing.assert_close(trained.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_a_scheduler_steps_once_per_update_and_can_be_taken_off() -> None:
    engine = built_from_the_config(1)[0]
    engine.set_gradient_accumulation_boundary(False)
    (batch,) = make_batches(1, MICRO)
    for _ in range(2):
        step_each(engine, engine.optimizer, [batch])
    assert engine.get_lr() == [0.1]
    engine.set_gradient_accumulation_boundary(True)
    step_each(engine, engine.optimizer, [batch])
    assert engine.get_lr() == [0.05]
    engine.lr_scheduler = None
    step_each(engine, engine.optimizer, [batch])
    assert engine.get_lr() == [0.05]


def test_a_plateau_scheduler_takes_its_metric_from_lr_kwargs() -> None:
    engine = zerolith.initialize(
        model=make_mlp(),
        optimizer=sgd,
        lr_scheduler=lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        config=config_for(1),
    )[0]
    (batch,) = make_batches(1, MICRO)
    for _ in range(3):
        engine.backward(loss_of(engine, batch))
        engine.step(lr_kwargs={"metrics": 1.0})
    assert engine.get_lr() == [0.025]


# --- the returned optimizer -------------------------------------------------------------------------


class Wrapping:
    """Imitates the optimizer that it wraps, as some trainers' wrappers do: its own __init__, everything else theirs."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.steps = 0
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    def step(self) -> Any:
        self.steps += 1
        return self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_a_wrapper_that_takes_the_class_of_the_returned_optimizer_works() -> None:
    batches = make_batches(3, MICRO)
    expected = train_plain(make_mlp(), batches, sgd)
    for stage in STAGES:
        engine = start(config_for(stage), make_optimizer=sgd)
        wrapped = Wrapping(engine.optimizer)
        assert isinstance(wrapped, optim.Optimizer)
        assert wrapped.param_groups is engine.basic_optimizer.param_groups
        assert wrapped.state is engine.basic_optimizer.state
        assert wrapped.overflow is False
        assert "WrappedZeroOptimizer" in type(wrapped).__name__
        assert repr(wrapped)
        decay(wrapped)

        def habit(engine: Any, optimizer: Any, micro: list[Batch], wrapped=wrapped) -> None:
            wrapped.zero_grad()
            engine.backward(loss_of(engine, micro[0]))
            wrapped.step()

        assert_close(train_engine(engine, batches, habit), expected)
        assert wrapped.steps == 3


def test_the_returned_optimizer_takes_no_closure_and_no_group() -> None:
    engine = start(config_for(1), make_optimizer=sgd)
    with pytest.raises(UsageError, match="takes no closure"):
        engine.optimizer.step(lambda: torch.ones(()))
    with pytest.raises(UsageError, match="fixed once initialize"):
        engine.optimizer.add_param_group({"params": []})


def test_the_optimizers_state_comes_back_on_the_same_ranks() -> None:
    batches = make_batches(4, 2 * MICRO)

    def body() -> None:
        for stage in (0, 2):
            whole = train_engine(start(config_for(stage), make_optimizer=adam), batches)
            engine = start(config_for(stage), make_optimizer=adam)
            first = [engine.optimizer.state_dict()]

            def note(engine: Any, optimizer: Any, micro: list[Batch], first=first) -> None:
                step_each(engine, optimizer, micro)
                first[0] = copy.deepcopy(optimizer.state_dict())

            half = train_engine(engine, batches[:2], note)
            model = make_mlp()
            model.load_state_dict(half.weights)
            again = start(config_for(stage), model=model, make_optimizer=adam)
            again.optimizer.load_state_dict(first[0])
            rest = train_engine(again, batches[2:])
            assert_same_bits(rest, whole._replace(norms=whole.norms[2:]))

    run_ranks(2, body)


def test_an_optimizer_of_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"shape \(24, 6\) that is not a parameter of the model"):
        zerolith.initialize(model=make_mlp(), optimizer=sgd(list(make_mlp().parameters())), config=config_for(1))
