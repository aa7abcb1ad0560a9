"""Some masters in host memory and the others as remainders of their weights: every bit of the training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import zerolith
from harness import run_ranks
from models import OPTIMIZERS, assert_same, make_gpt, train_on, whole_masters, whole_weights
from overlapping import DATA, config_for as overlapping_config_for
from zerolith.errors import IntegrityError
from zerolith.zero import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

NONE = {"device": "none"}


def host(ratio: float, *, overlap: str = "forward") -> dict[str, Any]:
    return {"device": "cpu", "ratio": ratio, "overlap": overlap}


def start(
    stage: int, offload: dict[str, Any], *, splits: bool, make: Callable[..., Any] | None = None, **more: Any
) -> Any:
    more = {"gradient_clipping": 0.0, **more}
    config = overlapping_config_for("forward", Path(), stage=stage, **more)
    config["bf16"] = {"enabled": True, "split_master": splits}
    config["zero_optimization"]["offload_optimizer"] = offload
    if make is not None:
        del config["optimizer"], config["scheduler"]
    return zerolith.initialize(model=make_gpt(), config=config, optimizer=make)[0]


def trained(stage: int, offload: dict[str, Any], splits: bool, **more: Any) -> Any:
    engine = start(stage, offload, splits=splits, **more)
    sections = [section for section in engine._sharded.sections if section.trained]
    if splits and offload["device"] == "cpu":
        apart = [section for section in sections if section.main is not None]
        assert all(section.is_split != section.is_offloaded for section in apart)
        share = sum(section.is_offloaded for section in sections) / len(sections)
        assert share == offload["ratio"] or 0 < share < 1
    losses = train_on(engine, DATA)
    return losses, whole_weights(engine), whole_masters(engine)


@cache
def plain(stage: int, world: int) -> Any:
    return run_ranks(world, lambda: trained(stage, NONE, False))


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_which_masters_are_split_changes_no_bit(stage: int, overlap: str, ratio: float) -> None:
    for world in (1, 2) if ratio == 0.4 else (2,):
        both = run_ranks(world, lambda: trained(stage, host(ratio, overlap=overlap), True))
        assert_same(both, plain(stage, world))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer(name: str, stage: int) -> None:
    make = OPTIMIZERS[name]
    none, both = (
        run_ranks(2, lambda o=offload, s=splits: trained(stage, o, s, make=make, gradient_clipping=0.5))
        for offload, splits in ((NONE, False), (host(0.5), True))
    )
    assert_same(both, none)


@pytest.mark.parametrize("stage", [1, 3])
def test_access_lending_integrity_and_checkpoints(stage: int, tmp_path: Path) -> None:
    def body(number: int, saving: tuple[dict[str, Any], bool], loading: tuple[dict[str, Any], bool]) -> Any:
        folder = tmp_path / str(number)
        engine = start(stage, saving[0], splits=saving[1], integrity_interval=1)
        train_on(engine, DATA[:2])
        params = dict(engine.module.named_parameters())
        states = []
        for name in ("blocks.0.up.weight", "blocks.2.up.weight", "norm.weight"):  # some here, some there
            param = params[name]
            states.append(safe_get_full_optimizer_state(param, "exp_avg"))
            safe_set_full_optimizer_state(param, states[-1] * 2, "exp_avg")
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 1.5)
        with zerolith.zero.GatheredParameters([params["norm.weight"], params["blocks.2.down.bias"]], modifier_rank=0):
            if engine.global_rank == 0:
                params["norm.weight"].data.mul_(2)
                params["blocks.2.down.bias"].data.add_(0.125)
        train_on(engine, DATA[2:3])
        for include in (["optim_states"], ["hp_params"], None):
            engine.offload_states(include)
            engine.reload_states()
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = start(stage, loading[0], splits=loading[1])
        engine.load_checkpoint(folder)
        return states, train_on(engine, DATA[3:]), whole_weights(engine), whole_masters(engine)

    none, both, most = (NONE, False), (host(0.4), True), (host(0.9), True)
    expected = run_ranks(2, body, 0, none, none)
    ways = [(both, both), (both, none), (none, both), (both, most), (both, (NONE, True)), (both, (host(1.0), False))]
    for number, (saving, loading) in enumerate(ways):
        assert_same(run_ranks(2, body, number + 1, saving, loading), expected)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_the_optimizers_state_dict_has_everything_in_one_order(name: str) -> None:
    """Of Muon's sections, those of whole tensors are never split."""
    options = {"optimizer": {"type": name, "params": {"lr": 1e-2}}}
    settings = [(NONE, False), (host(0.5), True), (host(0.0), True), (host(1.0), True)]
    engines = [start(2, offload, splits=splits, **options) for offload, splits in settings]
    for engine in engines:
        train_on(engine, DATA[:2])
    expected = engines[0].optimizer.state_dict()["state"]
    for engine in engines:
        assert_same(engine.optimizer.state_dict()["state"], expected)
    other = start(2, host(0.3), splits=True, **options)
    train_on(other, DATA[2:3])
    other.optimizer.load_state_dict(engines[1].optimizer.state_dict())
    assert_same(other.optimizer.state_dict()["state"], expected)
    train_on(other, DATA[3:4])
    for engine in [*engines, other]:
        engine.destroy()


def test_damage_is_found_on_either_side() -> None:
    for is_split in (True, False):
        engine = start(2, host(0.5), splits=True, integrity_interval=1)
        train_on(engine, DATA[:1])
        own = next(own for own in engine._partitioned.gradients if own.section.is_split is is_split)
        kept = engine._partitioned.split_masters.of(own.section).bits if is_split else own.section.main.data
        kept.numpy()[7] += 1  # past torch's count of writes
        with pytest.raises(IntegrityError, match="remainders of" if is_split else "master of"):
            train_on(engine, DATA[1:2])
        engine.destroy()


def test_bytes_and_what_the_summary_says_of_them() -> None:
    engine = start(2, host(0.5), splits=True)
    train_on(engine, DATA[:2])
    sections = engine._sharded.sections
    split = sum(section.main.data.numel() for section in sections if section.is_split)
    offloaded = sum(section.main.data.numel() for section in sections if section.is_offloaded)
    assert split
    assert offloaded
    residency = engine._partitioned.residency
    residency.settle()
    at_rest = {section: section.main.data.untyped_storage().nbytes() for section in sections}
    assert not any(at_rest[section] for section in sections if section.is_split)
    assert sum(at_rest.values()) == 4 * offloaded
    assert 2 * split <= residency.nbytes <= 2 * split + 12 * split // 2**12, "a few ties"
    assert engine.summary().bytes_per_rank["optimizer"] == 10 * split + 12 * offloaded
    assert "% of masters and states in host memory, other masters as remainders of the weights" in str(engine.summary())
    engine.destroy()


def test_an_edit_in_place_of_either_kind_is_kept() -> None:
    engine = start(1, host(0.5, overlap="none"), splits=True)
    train_on(engine, DATA[:2])
    for section in engine._sharded.sections:
        param = section.members[0].param
        with torch.no_grad():
            param[0] = 0.75
        engine._sharded.adopt_edits()
        assert torch.equal(safe_get_full_fp32_param(param).bfloat16(), param)
    train_on(engine, DATA[2:3])
    engine.destroy()
