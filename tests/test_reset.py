"""After an exception anywhere, reset() makes training go on as if the failed micro-batch had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from models import differing, sgd, start_engine, whole_weights, zero_config
from unusual import WIDTH, Chain, Checkpointed
from zerolith.errors import UsageError

STAGES = (0, 1, 2, 3)


class Boom(Exception):
    pass


def config_for(stage: int, *, gas: int = 1) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": 20}
    return zero_config(stage, gradient_accumulation_steps=gas, zero_optimization=zero)


def raise_boom(*_: Any) -> None:
    raise Boom


def in_forward(model: nn.Module) -> Any:
    """After the first layers have run; the module's own forward fails."""
    original, model.layers[1].forward = model.layers[1].forward, raise_boom
    return lambda: setattr(model.layers[1], "forward", original)


def in_forward_hook(model: nn.Module) -> Any:
    return model.layers[1].register_forward_hook(raise_boom).remove


def in_forward_pre_hook(model: nn.Module) -> Any:
    return model.layers[1].register_forward_pre_hook(raise_boom).remove


def in_backward(model: nn.Module) -> Any:
    """In the middle of the graph: some gradients have come, some are being sent."""

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(raise_boom)

    return model.layers[1].register_forward_hook(watch).remove


def in_parameter_hook(model: nn.Module) -> Any:
    """With gradients of a part of a unit."""

    def touch_all(module: nn.Module, args: Any) -> None:
        handles.append(module.inner.weight.register_hook(raise_boom))

    handles = [model.layers[1].register_forward_pre_hook(touch_all)]
    return lambda: [handle.remove() for handle in handles]


PLACES: dict[str, Callable[[nn.Module], Any]] = {
    "forward": in_forward,
    "forward hook": in_forward_hook,
    "forward pre-hook": in_forward_pre_hook,
    "backward": in_backward,
    "parameter hook": in_parameter_hook,
}


def inputs(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def micro_batch(engine: Any, step: int, micro: int, *, plain: bool) -> None:
    loss = engine(inputs(step, micro, engine.global_rank), step, engine.global_rank)
    if plain:
        loss.backward()
    else:
        engine.backward(loss)
    engine.step()


def train(stage: int, place: str | None, *, gas: int, plain: bool, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Three steps. With `place`, the last micro-batch of the second step fails first, and the step is done again."""
    torch.manual_seed(0)
    engine = start_engine(model or Chain(), config_for(stage, gas=gas), sgd)
    for step in range(3):
        if place is not None and step == 1:
            for micro in range(gas - 1):
                micro_batch(engine, step, micro, plain=plain)
            undo = PLACES[place](engine.module)
            with pytest.raises(Boom):
                micro_batch(engine, step, gas - 1, plain=plain)
            undo()
            if "forward" not in place:
                for call in (lambda: micro_batch(engine, 1, 0, plain=plain), engine.step):
                    with pytest.raises(UsageError, match=r"engine\.reset\(\)"):
                        call()
            engine.reset()
        for micro in range(gas):
            micro_batch(engine, step, micro, plain=plain)
    assert engine.global_steps == 3
    weights = whole_weights(engine)
    engine.destroy()
    return weights


def differences(place: str, gas: int, plain: bool) -> dict[int, list[str]]:
    found = {}
    for stage in STAGES:
        calm = train(stage, None, gas=gas, plain=plain)
        found[stage] = differing(train(stage, place, gas=gas, plain=plain), calm)
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("place", PLACES)
def test_training_goes_on_bitwise_as_if_nothing_had_been(place: str, plain: bool) -> None:
    for by_stage in run_ranks(2, differences, place, 1, plain):
        assert by_stage == {stage: [] for stage in STAGES}


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_reset_drops_the_micro_batches_since_the_last_step(place: str) -> None:
    for by_stage in run_ranks(2, differences, place, 2, False):
        assert by_stage == {stage: [] for stage in STAGES}


def fail_in_recomputation(reentrant: bool) -> dict[int, list[str]]:
    found = {}
    for stage in STAGES:
        made = lambda: Checkpointed("outside", reentrant=reentrant)  # noqa: E731
        torch.manual_seed(0)
        calm = train(stage, None, gas=1, plain=False, model=made())
        torch.manual_seed(0)
        model = made()
        engine = start_engine(model, config_for(stage), sgd)
        for step in range(3):
            if step == 1:
                loss = engine(inputs(1, 0, engine.global_rank), 1, 0)
                undo = in_forward(engine.module)
                with pytest.raises(Boom):
                    engine.backward(loss)
                undo()
                engine.reset()
            micro_batch(engine, step, 0, plain=False)
        found[stage] = differing(whole_weights(engine), calm)
        engine.destroy()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_failed_recomputation_is_survived_too(reentrant: bool) -> None:
    for by_stage in run_ranks(2, fail_in_recomputation, reentrant):
        assert by_stage == {stage: [] for stage in STAGES}


def at_rest_after(place: str) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = start_engine(Chain(), config_for(3), sgd)
    micro_batch(engine, 0, 0, plain=False)
    PLACES[place](engine.module)
    with pytest.raises(Boom):
        micro_batch(engine, 1, 0, plain=False)
    engine.reset()
    engine.reset()  # twice does no harm
    sharded = engine._sharded
    return {
        "phases": {unit.phase.name for unit in sharded.units if unit.is_sharded},
        "uses": sum(unit.uses for unit in sharded.units),
        "terms": sum(own.term is not None for own in sharded.gradients),
        "gathered": sum(section.whole.is_allocated for section in sharded.sections),
    }


@pytest.mark.parametrize("place", PLACES)
def test_reset_brings_every_unit_to_rest(place: str) -> None:
    at_rest = {"phases": {"REST"}, "uses": 0, "terms": 0, "gathered": 0}
    assert run_ranks(2, at_rest_after, place) == [at_rest] * 2
