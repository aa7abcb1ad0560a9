"""Masters as what their weights lack: every bit of the training, for two bytes less."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import zerolith
from harness import run_ranks
from models import OPTIMIZERS, assert_same, make_gpt, token_batches, train_on, whole_masters, whole_weights, zero_config
from plain import world_size
from zerolith import kernels
from zerolith.errors import ConfigError, IntegrityError
from zerolith.optim.split_masters import Remainder, SplitMasters
from zerolith.zero import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

DATA = token_batches(6, 8)
MIDWAY = 0x3F808000  # between two bf16, the lower of which is even


def config_for(stage: int, *, splits: bool, **more: Any) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size() // 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "split_master": splits},
    }
    return zero_config(stage, zero_optimization={"reduce_bucket_size": 4000}, **{**config, **more})


def start(stage: int, *, splits: bool, make: Callable[..., Any] | None = None, **more: Any) -> Any:
    config = config_for(stage, splits=splits, **more)
    if make is not None:
        del config["optimizer"]
    return zerolith.initialize(model=make_gpt(), config=config, optimizer=make)[0]


def trained(stage: int, *, splits: bool, **more: Any) -> Any:
    engine = start(stage, splits=splits, **more)
    assert engine._partitioned.residency.is_swapped == splits
    return train_on(engine, DATA), whole_weights(engine), whole_masters(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_at_every_stage(stage: int) -> None:
    for world in (1, 2):
        whole, split = (run_ranks(world, lambda s=splits: trained(stage, splits=s)) for splits in (False, True))
        assert_same(split, whole)


def test_four_ranks() -> None:
    more = {"train_micro_batch_size_per_gpu": 1}
    whole, split = (run_ranks(4, lambda s=splits: trained(3, splits=s, **more)) for splits in (False, True))
    assert_same(split, whole)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer(name: str, stage: int) -> None:
    make = OPTIMIZERS[name]
    whole, split = (run_ranks(2, lambda s=splits: trained(stage, splits=s, make=make)) for splits in (False, True))
    assert_same(split, whole)


@pytest.mark.parametrize("stage", [1, 3])
def test_access_lending_integrity_and_checkpoints(stage: int, tmp_path: Path) -> None:
    def body(*, splits: bool, loads: bool) -> Any:
        folder = tmp_path / f"{splits}-{loads}"
        engine = start(stage, splits=splits, integrity_interval=1)
        train_on(engine, DATA[:2])
        params = dict(engine.module.named_parameters())
        param = params["blocks.0.up.weight"]
        state = safe_get_full_optimizer_state(param, "exp_avg")
        safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 1.5)
        with zerolith.zero.GatheredParameters([params["norm.weight"]], modifier_rank=0):
            if engine.global_rank == 0:
                params["norm.weight"].data.mul_(2)
        train_on(engine, DATA[2:3])
        engine.offload_states()
        engine.reload_states()
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = start(stage, splits=loads)
        engine.load_checkpoint(folder)
        return state, train_on(engine, DATA[3:]), whole_weights(engine), whole_masters(engine)

    plain = run_ranks(2, lambda: body(splits=False, loads=False))
    for splits, loads in ((True, True), (True, False), (False, True)):
        assert_same(run_ranks(2, lambda s=splits, o=loads: body(splits=s, loads=o)), plain)


def test_an_edit_in_place_is_kept() -> None:
    """The master is near the edited weight, and exactly what it was elsewhere."""
    engine = start(1, splits=True)
    train_on(engine, DATA[:3])
    param = engine.module.blocks[1].up.weight
    before = safe_get_full_fp32_param(param).clone()
    with torch.no_grad():
        param[3] = 0.75
        param[4] = 0.0
    engine._sharded.adopt_edits()
    master = safe_get_full_fp32_param(param)
    assert torch.equal(master.bfloat16(), param)
    assert (master[3] - 0.75).abs().max() <= 2**-9
    assert master[4].abs().max() < 1e-38
    others = [row for row in range(len(param)) if row not in (3, 4)]
    assert torch.equal(master[others], before[others])
    train_on(engine, DATA[3:])
    engine.destroy()


def test_a_weight_that_is_set_to_nothing_has_a_number_for_master() -> None:
    engine = start(1, splits=True)
    train_on(engine, DATA[:3])
    param = engine.module.blocks[1].up.weight
    with torch.no_grad():
        param[:8] = 0
    assert torch.isfinite(safe_get_full_fp32_param(param)).all(), "also before the next step looks for edits"
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_master_that_is_set_twice_is_what_was_set_last(stage: int) -> None:
    """The second time to a tie, whose weight rounded away from zero is that of the first."""
    engine = start(stage, splits=True)
    train_on(engine, DATA[:1])
    param = engine.module.blocks[1].up.weight
    first, second = 1.0078125, 1.00390625
    for value in (first, second):
        safe_set_full_fp32_param(param, torch.full((128, 32), value))
    assert (safe_get_full_fp32_param(param) == second).all()
    engine.destroy()


def test_damaged_remainders_and_states_are_found() -> None:
    for what in ("remainders", "exp_avg"):
        engine = start(2, splits=True, integrity_interval=1)
        train_on(engine, DATA[:1])
        own = engine._partitioned.gradients[3]
        state = engine._partitioned.state_of(engine._partitioned.pieces[own][0].param)
        kept = engine._partitioned.split_masters.of(own.section).bits if what == "remainders" else state["exp_avg"]
        kept.numpy()[7] += 1  # past torch's count of writes
        with pytest.raises(IntegrityError, match=f"{what} of {re.escape(own.section.name)}"):
            train_on(engine, DATA[1:2])
        engine.destroy()


def test_replicas_of_split_masters_are_compared_at_stage_0() -> None:
    def body(damage: bool) -> str:
        engine = start(0, splits=True, integrity_interval=1)
        train_on(engine, DATA[:1])
        if damage and engine.global_rank == 1:
            own = engine._partitioned.gradients[0]
            with engine._partitioned.residency.resident(own):
                own.section.main.data[3] += 2**-20
        try:
            train_on(engine, DATA[1:2])
        except IntegrityError as error:
            return str(error)
        return ""

    assert run_ranks(2, body, False) == ["", ""]
    for text in run_ranks(2, body, True):
        assert "master of" in text


def test_the_optimizers_state_dict_has_everything() -> None:
    whole, split = start(1, splits=False), start(1, splits=True)
    for engine in (whole, split):
        train_on(engine, DATA[:2])
    assert_same(split.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])
    other = start(1, splits=True)
    train_on(other, DATA[2:3])
    other.optimizer.load_state_dict(split.optimizer.state_dict())
    assert_same(other.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])
    train_on(other, DATA[3:4])


def test_the_end_needs_no_memory_for_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(1, splits=True)
    train_on(engine, DATA[:2])
    monkeypatch.setattr(SplitMasters, "read", None)
    engine.destroy()


# --- bytes --------------------------------------------------------------------------------------


def bytes_at_rest(engine: Any) -> dict[str, int]:
    """Of masters, of states, and of remainders, in memory."""
    residency = engine._partitioned.residency
    residency.settle()
    masters = sum(section.main.data.untyped_storage().nbytes() for section in engine._sharded.sections)
    states = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in engine._partitioned.states_here()
        for value in state.values()
        if value.dim()
    }
    return {"masters": masters, "states": sum(states.values()), "remainders": residency.nbytes}


def test_ten_bytes_for_each_parameter() -> None:
    engine = start(2, splits=True)
    train_on(engine, DATA)
    numel = sum(section.main.data.numel() for section in engine._sharded.sections)
    at_rest = bytes_at_rest(engine)
    largest = max(section.main.data.nbytes for section in engine._sharded.sections)
    assert at_rest["masters"] <= largest, "but for the section that is joined ahead"
    assert at_rest["states"] == 8 * numel
    assert 2 * numel <= at_rest["remainders"] <= 2 * numel + 12 * numel // 2**13, "a few ties"
    assert "masters as remainders of the weights" in str(engine.summary())
    assert engine.summary().bytes_per_rank["optimizer"] == 10 * numel
    engine.offload_states()
    assert bytes_at_rest(engine) == {"masters": 0, "states": 0, "remainders": at_rest["remainders"]}
    store = engine._partitioned.split_masters
    kept = [tensor for section in engine._sharded.sections for tensor in store.of(section).tensors()]
    assert not any(tensor.untyped_storage().nbytes() for tensor in kept), "lent, like the rest"
    engine.reload_states()
    train_on(engine, DATA[:1])
    engine.destroy()


# --- the store ----------------------------------------------------------------------------------


class Beside:
    """A section as the store sees it."""

    def __init__(self, masters: Tensor, weights: Tensor) -> None:
        self.main, self.weights = Held(masters), Held(weights)

    def edited(self) -> bool:
        return False


class Held:
    placement = "the same"

    def __init__(self, data: Tensor) -> None:
        self.data = data


def there_and_back(masters: Tensor, weights: Tensor) -> tuple[Tensor, Remainder]:
    store = SplitMasters([Beside(masters, weights)])  # type: ignore[list-item]  # all that it looks at
    region = store.add(masters.nbytes)
    storage = masters.untyped_storage()
    store.write(region, storage).wait()
    masters.fill_(float("nan"))
    store.read(region, storage).wait()
    return masters, region


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
@settings(max_examples=300)
def test_every_number_comes_back(bits: list[int]) -> None:
    masters = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    expected = masters.clone()
    found, _ = there_and_back(masters, expected.bfloat16())
    numbers = ~expected.isnan()
    assert torch.equal(found.view(torch.int32)[numbers], expected.view(torch.int32)[numbers])
    assert torch.equal(found.isnan(), expected.isnan())


def test_ties_and_only_those_are_kept_whole() -> None:
    bits = MIDWAY + torch.arange(-(2**18), 2**18, dtype=torch.int32)
    expected = bits.view(torch.float32).clone()
    found, region = there_and_back(bits.view(torch.float32), expected.bfloat16())
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert len(region.odd) == 2**19 // 2**17
    assert kernels.split(expected)[0].view(torch.int16)[region.odd].remainder(2).all(), "away from the even ones"


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_weights_that_are_not_the_masters_rounded_cost_room_and_no_bit(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected, weights = (torch.randn(500, generator=generator) for _ in range(2))
    weights = torch.where(torch.rand(500, generator=generator) < share, weights, expected).bfloat16()
    found, region = there_and_back(expected.clone(), weights)
    assert torch.equal(found, expected)
    assert len(region.odd) == len(region.whole) == int((weights != kernels.split(expected)[0]).sum())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bf16": {"split_master": True}}, "set bf16.enabled"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
            'offload_optimizer parts them; choose one, or its device "cpu"',
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param parts them"),
    ],
    ids=["not bf16", "masters on disk", "offloaded weights"],
)
def test_wrong_configs(more: dict[str, Any], message: str) -> None:
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True, "split_master": True}}
    with pytest.raises(ConfigError, match=message):
        zerolith.initialize(model=make_gpt(), config={**config, **more})
