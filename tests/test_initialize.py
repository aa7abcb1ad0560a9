"""From what people pass to an engine: what wins, what is refused, and that ranks fail together."""

from __future__ import annotations

import argparse
import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import zerolith
from harness import run_ranks
from plain import MICRO, config_for, loss_of, make_batches, make_mlp, start, train_engine, weights_of
from zerolith.comm import default_comm
from zerolith.errors import ConfigError, OptimizerError, UsageError

Rewrite = Callable[[dict[str, Any]], None]


class SampleModel(nn.Module):
    """The tutorial's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Records(logging.Handler):
    """What the library says from INFO on, while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Records:
        logger = logging.getLogger("zerolith")
        self.level_before = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("zerolith").removeHandler(self)
        logging.getLogger("zerolith").setLevel(self.level_before)


# --- the tutorial -----------------------------------------------------------------------------------


def tutorial(steps: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    with Records() as records:
        model = SampleModel()
        optimizer = optim.Adam(model.parameters(), lr=0.001)
        cfg = {
            "train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
            "zero_optimization": {"stage": 1},
        }
        engine, optimizer, _, _ = zerolith.initialize(model=model, optimizer=optimizer, config_params=cfg)
        for _ in range(steps):
            loss = engine(torch.randn(8, 10)).mean()
            engine.backward(loss)
            engine.step()
    return weights_of(model), records.lines


def tutorial_by_plain_pytorch(steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = SampleModel()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    for step in range(steps):
        (model(torch.randn(8, 10)).mean() / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_tutorial_runs_as_it_stands(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher's environment, and on two ranks."""
    expected = tutorial_by_plain_pytorch(6)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    results = [tutorial(6)] if ranks == 1 else run_ranks(ranks, tutorial, 6)
    for weights, _ in results:
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7)
    said = [line for _, lines in results for line in lines if "the passed one is used" in line]
    assert len(said) == 1
    assert "'Adam'" in said[0]


# --- where the config comes from --------------------------------------------------------------------


def sources(path: Path) -> dict[str, dict[str, Any]]:
    config = {"train_batch_size": 6}
    text = json.dumps(config)
    path.write_text(text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    return {
        "config as a dict": {"config": config},
        "config as a path": {"config": str(path)},
        "config as a Path": {"config": path},
        "config in base64": {"config": encoded},
        "config_params": {"config_params": config},
        "args as a namespace": {"args": argparse.Namespace(deepspeed_config=str(path))},
        "args as a dict": {"args": {"deepspeed_config": config}},
        "args without one, and config": {"args": argparse.Namespace(local_rank=0), "config": config},
    }


def test_a_config_comes_from_any_of_these(tmp_path: Path) -> None:
    for name, kwargs in sources(tmp_path / "config.json").items():
        engine, *_ = zerolith.initialize(model=SampleModel(), **kwargs)
        assert engine.train_batch_size() == 6, name


def test_engine_config_is_the_raw_dict_whatever_the_module_calls_its_own() -> None:
    model = SampleModel()
    model.config = object()  # as models of the transformers library have one
    config = {"train_batch_size": 4, "steps_per_print": 10}
    engine = zerolith.initialize(model=model, config=config)[0]
    assert engine.config is config
    assert engine.module.config is model.config


# --- what is refused --------------------------------------------------------------------------------

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def call(**kwargs: Any) -> Any:
    return zerolith.initialize(**({"model": make_mlp(), "config": config_for(1, **SGD)} | kwargs))


def twice_in_groups() -> optim.Optimizer:
    weight = make_mlp()[0].weight
    optimizer = optim.SGD([weight], lr=0.1)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [weight]})
    return optimizer


def stepped(model: nn.Module) -> optim.Optimizer:
    optimizer = optim.Adam(model.parameters())
    loss_of(model, make_batches(1, 2)[0]).backward()
    optimizer.step()
    return optimizer


def with_model(make: Callable[[nn.Module], Any], keyword: str = "optimizer") -> Callable[[], Any]:
    def run() -> Any:
        model = make_mlp()
        return call(model=model, **{keyword: make(model)})

    return run


def scheduler_of_another(model: nn.Module) -> Any:
    return optim.lr_scheduler.StepLR(optim.SGD(model.parameters(), lr=0.1), step_size=1)


REFUSED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no model", lambda: call(model=None), UsageError, "torch.nn.Module, not NoneType"),
    ("no config", lambda: call(config=None), ConfigError, "no config; pass exactly one of"),
    ("two configs", lambda: call(config_params={}), ConfigError, "more than one config; pass exactly one of"),
    ("a wrong config", lambda: call(config={"train_batch_size": 0}), ConfigError, "train_batch_size"),
    ("no batch size", lambda: call(config={}), ConfigError, "neither train_batch_size nor"),
    ("no optimizer", lambda: call(config=config_for(2)), ConfigError, "stage: 2 .* there is no optimizer"),
    ("no optimizer", lambda: call(optimizer=3), OptimizerError, "is a int, not a torch Optimizer"),
    ("a factory of none", lambda: call(optimizer=lambda params: 3), OptimizerError, r"optimizer\(...\) returned"),
    ("a strange tensor", lambda: call(optimizer=optim.SGD(make_mlp().parameters())), OptimizerError, "not a param"),
    ("a stepped optimizer", with_model(stepped), OptimizerError, "stepped already"),
    ("nothing to train", lambda: call(model=make_mlp().requires_grad_(False)), ConfigError, "trainable"),
    ("another's scheduler", with_model(scheduler_of_another, "lr_scheduler"), OptimizerError, "another optimizer"),
    (
        "a scheduler alone",
        lambda: call(config=config_for(0), lr_scheduler=lambda optimizer: optimizer),
        UsageError,
        "scheduler but no optimizer",
    ),
    (
        "a configured scheduler alone",
        lambda: call(config=config_for(0, scheduler={"type": "StepLR", "params": {"step_size": 1}})),
        UsageError,
        "scheduler but no optimizer",
    ),
    ("a scheduler of no kind", lambda: call(lr_scheduler=lambda optimizer: None), UsageError, "has no step"),
]


@pytest.mark.parametrize(("run", "error", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_mistakes_are_told_in_one_sentence(run: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_parameter_in_two_groups_is_refused_by_name() -> None:
    model = make_mlp()
    optimizer = optim.SGD([model[0].weight], lr=0.1)
    optimizer.param_groups.append({**optimizer.param_groups[0]})
    with pytest.raises(OptimizerError, match=r"'0\.weight' is in optimizer\.param_groups 0 and 1"):
        call(model=model, optimizer=optimizer)


def test_trainable_parameters_without_an_optimizer_are_named_once_and_stay() -> None:
    model = make_mlp()
    before = weights_of(model)
    (batch,) = make_batches(1, MICRO)
    with Records() as records:
        engine = call(model=model, optimizer=optim.SGD(model[0].parameters(), lr=0.1), config=config_for(1))[0]
        trained = train_engine(engine, [batch])
    (line,) = [line for line in records.lines if "no optimizer group" in line]
    assert "2.weight" in line
    assert torch.equal(trained.weights["2.weight"], before["2.weight"])
    assert not torch.equal(trained.weights["0.weight"], before["0.weight"])


# --- what is taken ----------------------------------------------------------------------------------


def test_an_optimizer_may_come_as_a_function_of_the_parameters() -> None:
    given = []

    def make(params: list[Any]) -> optim.Optimizer:
        given.extend(params)
        return optim.SGD(params, lr=0.25)

    model = make_mlp()
    engine, optimizer, _, _ = call(model=model, optimizer=make, config=config_for(2))
    assert [id(param) for param in given] == [id(param) for param in model.parameters()]
    assert engine.get_lr() == [0.25]
    assert isinstance(optimizer, optim.Optimizer)


@pytest.mark.parametrize("form", ["generator", "groups", "named"])
def test_model_parameters_say_what_a_configured_optimizer_trains(form: str) -> None:
    model = make_mlp()
    model[2].bias.requires_grad_(False)
    forms = {
        "generator": (param for param in model.parameters()),
        "groups": [{"params": list(model[0].parameters()), "lr": 0.5}, {"params": list(model[2:].parameters())}],
        "named": model.named_parameters(),
    }
    engine = call(model=model, model_parameters=forms[form])[0]
    assert engine.get_lr() == ([0.5, 0.1] if form == "groups" else [0.1])
    (batch,) = make_batches(1, MICRO)
    frozen = model[2].bias.detach().clone()
    assert torch.equal(train_engine(engine, [batch]).weights["2.bias"], frozen)


def test_float16_autocast_scales_the_loss() -> None:
    autocast = {"enabled": True, "dtype": "float16"}
    engine = start(config_for(1, torch_autocast=autocast, **SGD))
    assert engine.loss_scale() == 2.0**16
    assert engine.dynamic_loss_scale()


# --- ranks agree or stop ----------------------------------------------------------------------------


def attempt(rewrite: Rewrite) -> tuple[str, str]:
    """initialize() on this rank, after `rewrite` on rank 1 alone; the error's class and text."""
    settings: dict[str, Any] = {
        "model": make_mlp(),
        "config": config_for(1, steps_per_print=7),
        "make": lambda params: optim.SGD(params, lr=0.1),
    }
    if torch.distributed.get_rank() == 1:
        rewrite(settings)
    make = settings.pop("make")
    optimizer = make(settings["model"].parameters()) if make else None
    try:
        zerolith.initialize(**settings, optimizer=optimizer)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def change(**values: Any) -> Rewrite:
    return lambda settings: settings.update(values)


def config_of(**values: Any) -> Rewrite:
    return lambda settings: settings["config"].update(values)


def with_buffer(settings: dict[str, Any]) -> None:
    settings["model"].register_buffer("extra", torch.zeros(2))


DIFFERENCES: list[tuple[str, Rewrite, list[str]]] = [
    ("a config value", config_of(steps_per_print=8), ["config.steps_per_print: rank 0 has 7, rank 1 has 8"]),
    ("a config key", config_of(bf16={"enabled": True}), ["config.bf16: rank 0 has (missing), rank 1 has"]),
    ("a shape", change(model=make_mlp(width=25)), ["0.weight: rank 0 has", "(24, 6)", "(25, 6)"]),
    ("a dtype", change(model=make_mlp().double()), ["0.weight: rank 0 has", "float32", "float64"]),
    ("a parameter", change(model=nn.Sequential(*make_mlp()[:4])), ["4.weight: ", "rank 1 has (missing)"]),
    ("a buffer", with_buffer, ["buffer extra: rank 0 has (missing), rank 1 has torch.float32 (2,)"]),
    (
        "a learning rate",
        change(make=lambda params: optim.SGD(params, lr=0.2)),
        ["optimizer.param_groups[0].lr: rank 0 has 0.1, rank 1 has 0.2"],
    ),
    ("an optimizer", change(make=optim.Adam), ["optimizer: rank 0 has SGD, rank 1 has Adam"]),
    (
        "the groups",
        change(make=lambda params: optim.SGD([{"params": [param]} for param in params], lr=0.1)),
        ["0.bias: rank 0 has", "group 0", "group 1"],
    ),
    (
        "the order of parameters",
        lambda settings: settings["model"]._modules.update(
            {name: settings["model"]._modules.pop(name) for name in ("0", "2")}
        ),
        ["0.weight: rank 0 has number 0"],
    ),
]


def test_ranks_with_different_settings_all_stop_and_show_each_ranks_value() -> None:
    def body() -> list[tuple[str, str]]:
        return [attempt(rewrite) for _, rewrite, _ in DIFFERENCES]

    for told in run_ranks(2, body):
        for (kind, text), (name, _, words) in zip(told, DIFFERENCES, strict=True):
            assert kind == "HandshakeError", name
            for word in words:
                assert word in text, name
            assert "\n" not in text, name


def fails(error: Exception) -> Callable[[Any], Any]:
    def make(params: Any) -> Any:
        raise error

    return make


FAILURES: list[tuple[str, Rewrite, str, str]] = [
    ("a wrong config", config_of(train_batch_size=5), "ConfigError", "train_batch_size 5"),
    ("an unknown key", config_of(train_batchsize=4), "ConfigError", "train_batchsize"),
    ("no model", change(model=None, make=None), "UsageError", "torch.nn.Module, not NoneType"),
    ("a tired optimizer", change(make=None, optimizer=None), "ConfigError", "there is no optimizer"),
    ("a client's own error", change(lr_scheduler=fails(KeyError("mine"))), "KeyError", "mine"),
    ("an error without a text", change(lr_scheduler=fails(ValueError())), "ValueError", "ValueError"),
    ("data without samples", change(training_data=[]), "UsageError", "training_data"),
    ("another's scheduler", change(lr_scheduler=scheduler_of_another(make_mlp())), "OptimizerError", "drives another"),
]


def test_an_error_on_one_rank_reaches_all_and_the_next_attempt_succeeds() -> None:
    def attempt_without(rewrite: Rewrite) -> tuple[str, str]:
        def clean(settings: dict[str, Any]) -> None:
            rewrite(settings)
            settings.pop("optimizer", None)

        return attempt(clean)

    def body() -> list[tuple[str, str]]:
        told = [attempt_without(rewrite) for _, rewrite, _, _ in FAILURES]
        assert attempt(lambda settings: None) == ("", "")
        return told

    healthy, failing = run_ranks(2, body)
    for mine, theirs, (name, _, kind, words) in zip(healthy, failing, FAILURES, strict=True):
        assert theirs[0] == kind, name
        assert mine[0] == "HandshakeError", name
        assert "rank 1 failed: " in mine[1], name
        for text in (mine[1], theirs[1] or kind):
            assert words in text, name


def test_ranks_may_bring_different_weights_and_all_use_rank_0s() -> None:
    def body() -> None:
        rank = default_comm().rank
        for stage in (0, 3):
            engine = start(config_for(stage, **SGD), model=make_mlp(seed=rank))
            weights = train_engine(engine, []).weights
            for name, weight in weights_of(make_mlp(seed=0)).items():
                assert torch.equal(weights[name], weight)

    run_ranks(2, body)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE=-1", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK=-1", "WORLD_SIZE=2"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "first", "WORLD_SIZE": "2"}, ["RANK='first'", "whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "x"}, ["MASTER_PORT='x'"]),
    ],
)
def test_half_an_environment_is_refused(
    environment: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_dist_init_required_false_joins_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine = call(dist_init_required=False)[0]
    assert engine.world_size == 1
    assert not torch.distributed.is_initialized()


ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


class Buffers(nn.Module):
    """Buffers of any strides and dtypes, other ones on each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("expanded", torch.full((1,), 1.0 + rank).expand(1000, 3))
        self.register_buffer("part", (torch.arange(60.0).view(10, 6) + 100 * rank)[:, :3])
        self.register_buffer("turned", (torch.arange(6.0).view(2, 3) + 100 * rank).t())
        self.register_buffer("short", torch.tensor([1 + rank, 2], dtype=torch.int16))
        self.register_buffer("small", torch.tensor([1.5 + rank]).to(torch.float8_e4m3fn))
        self.register_buffer("scalar", torch.tensor(3 + rank))
        self.register_buffer("flag", torch.tensor([rank == 0, False]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("absent", None)


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_of_any_strides_and_dtypes_are_those_of_rank_0(stage: int) -> None:
    def body() -> None:
        model = Buffers(default_comm().rank)
        zerolith.initialize(model=model, config={"train_batch_size": 2, "zero_optimization": {"stage": stage}, **ADAM})
        for name, expected in Buffers(0).named_buffers():
            found = model.get_buffer(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(found.float(), expected.float()), name

    run_ranks(2, body)


def test_a_sparse_buffer_is_refused_by_name() -> None:
    def body() -> None:
        model = nn.Linear(2, 2)
        model.register_buffer("graph", torch.eye(2).to_sparse())
        with pytest.raises(UsageError, match=r"'graph' of a Linear is sparse"):
            zerolith.initialize(model=model, config={"train_batch_size": 2, **ADAM})

    run_ranks(2, body)


def test_keys_without_effect_are_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """Those of which that is no wonder where INFO is shown, the others everywhere."""
    zero = {"stage": 1, "round_robin_gradients": True}
    config = {"train_batch_size": 2, "zero_optimization": zero, "zero_optimization.stage": 3, **ADAM}
    with Records() as records:
        zerolith.initialize(model=nn.Linear(2, 2), config=config)[0].destroy()
    assert any(line.startswith("config: zero_optimization.round_robin_gradients: ") for line in records.lines)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("config: zero_optimization.stage: a dotted name sets nothing; write 'stage' inside")
