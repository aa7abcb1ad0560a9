"""Offloaded states that come to the device once its memory is measured: the same bits, and whole sections on all ranks.

The host is both here. A fake gauge tells of a device with room, and offloaded masters are kept apart from the weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import zerolith
from harness import run_ranks
from models import PRECISIONS, assert_same, make_gpt, train_on, whole_masters, whole_weights
from overlapping import DATA, config_for as overlapping_config_for
from zerolith.buffer import FlatBuffer
from zerolith.memory.room import DeviceMemory
from zerolith.optim import filling
from zerolith.section import Section
from zerolith.zero import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)

PLENTY = 10**12
SOME = 240_000  # room for some of the sections
OVERLAPS = ("none", "forward", "backward")


class Gauge:
    """Tells of one amount of free memory after the other."""

    def __init__(self, free: Sequence[int]) -> None:
        self.left = list(free)

    def look(self) -> DeviceMemory:
        return DeviceMemory(total=0, free=self.left.pop(0), rise=0)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded masters never share the weights' memory, as where that is a device's; looks come early."""
    make, target = Section._make_main, Section.cast_target.fget

    def made(section: Section, packed: FlatBuffer) -> FlatBuffer | None:
        main = make(section, packed)
        if main is not None and section.master_device is not None and main.shares_memory_with(section.weights):
            return packed.copy(section.plan.partitioning.optim, main.data.dtype)
        return main

    monkeypatch.setattr(Section, "_make_main", made)
    monkeypatch.setattr(
        Section, "cast_target", property(lambda section: None if section.master_device is not None else target(section))
    )
    monkeypatch.setattr(filling, "LOOKS", (2, 4))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how much memory is free at each look; without it there is no device beside the host."""
    return lambda *free: monkeypatch.setattr(filling, "gauge_of", lambda device: Gauge(free))


def config_for(stage: int, overlap: str, *, device: str = "cpu", **more: Any) -> dict[str, Any]:
    offload = more.pop("offload", {})
    config = overlapping_config_for(overlap, Path(), stage=stage, device=device, **more)
    config["zero_optimization"]["offload_optimizer"] |= offload
    return config


def start(stage: int, overlap: str = "forward", *, make: Callable[..., Any] | None = None, **more: Any) -> Any:
    config = config_for(stage, overlap, **more)
    if make is not None:
        del config["optimizer"], config["scheduler"]
    return zerolith.initialize(model=make_gpt(), config=config, optimizer=make)[0]


def trained_sections(engine: Any) -> list[Section]:
    return [section for section in engine._sharded.sections if section.trained]


def num_moved(engine: Any) -> int:
    """How many sections have come; they are the first ones."""
    flags = [not section.is_offloaded for section in trained_sections(engine)]
    assert flags == sorted(flags, reverse=True), "first units first"
    return sum(flags)


def result_of(engine: Any, *keys: str) -> Any:
    states = [safe_get_full_optimizer_state(param, key) for param in engine.module.parameters() for key in keys]
    result = whole_weights(engine), whole_masters(engine), states
    engine.destroy()
    return result


def moving(stage: int, overlap: str, keys: Sequence[str] = (), **more: Any) -> Any:
    """Two steps; some sections come; two steps, all come; two steps."""
    engine = start(stage, overlap, **more)
    fills = engine._filling is not None
    counts, losses = [], []
    for number, batch in enumerate(DATA):
        losses += train_on(engine, batch[None])
        if number in (0, 1, 3, 5):
            counts.append(num_moved(engine))
    total = len(trained_sections(engine))
    assert counts == [0] * 4 if not fills else (counts[0] == 0 < counts[1] < counts[2] == counts[3] == total)
    return losses, result_of(engine, *keys)


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_moving_in_the_midst_of_training_changes_no_bit(
    stage: int, world: int, precision: str, room: Callable[..., None]
) -> None:
    def body(overlap: str) -> Any:
        return moving(stage, overlap, ("exp_avg", "exp_avg_sq"), **PRECISIONS[precision])

    expected = run_ranks(world, body, "none")
    room(SOME // world + 60_000, PLENTY)
    for overlap in OVERLAPS:
        assert_same(run_ranks(world, body, overlap), expected)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "two groups": lambda params: torch.optim.AdamW(
        [{"params": params[1::2], "weight_decay": 0.0}, {"params": params[::2], "lr": 3e-3}], lr=1e-2, fused=True
    ),
}


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Adam", "Muon"])
def test_every_kind_of_optimizer(name: str, stage: int, precision: str, room: Callable[..., None]) -> None:
    def body() -> Any:
        options: dict[str, Any] = {"optimizer": {"type": name, "params": {"lr": 1e-2, "weight_decay": 0.1}}}
        if name in OPTIMIZERS:
            options = {"make": OPTIMIZERS[name]}
        elif name == "Adam":
            options["optimizer"]["params"]["adam_w_mode"] = False
        engine = start(stage, **options, **PRECISIONS[precision])
        losses = train_on(engine, DATA)
        assert num_moved(engine) == (len(trained_sections(engine)) if engine._filling is not None else 0)
        return losses, result_of(engine)

    expected = run_ranks(2, body)
    room(SOME, PLENTY)
    assert_same(run_ranks(2, body), expected)


def test_a_loss_scale_that_skips_steps_counts_only_updates(room: Callable[..., None]) -> None:
    more = {"fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 100, "hysteresis": 1}}

    def body() -> Any:
        engine, seen = start(3, **more), []
        for batch in DATA:
            train_on(engine, batch[None])
            seen.append((engine.global_steps - engine.skipped_steps, num_moved(engine)))
        assert engine.skipped_steps
        assert engine._filling is None or [count > 0 for _, count in seen] == [number >= 2 for number, _ in seen]
        return result_of(engine)

    expected = run_ranks(2, body)
    room(PLENTY, PLENTY)
    assert_same(run_ranks(2, body), expected)


class Sometimes(nn.Module):
    """One parameter is not used every other time, so that pieces are cut in the second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rare, self.calls = nn.Linear(8, 300), nn.Linear(8, 300), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.always(x) + (self.rare(x) if self.calls % 2 else 0)).square().mean()


@pytest.mark.parametrize("stage", [1, 3])
def test_pieces_that_are_cut_move(stage: int, room: Callable[..., None]) -> None:
    def body() -> Any:
        config = config_for(stage, "forward", gradient_accumulation_steps=1)
        config["zero_optimization"]["reduce_bucket_size"] = 100_000
        engine = zerolith.initialize(model=Sometimes(), config=config)[0]
        torch.manual_seed(engine.global_rank)
        for _ in range(7):
            engine.backward(engine(torch.randn(2, 8)))
            engine.step()
        return result_of(engine, "exp_avg")

    expected = run_ranks(2, body)
    room(PLENTY, PLENTY)
    assert_same(run_ranks(2, body), expected)


# --- what composes with it ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_access_lending_integrity_and_checkpoints(
    stage: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(number: int, saving: str, loading: str) -> Any:
        engine = started(saving, integrity_interval=1)
        train_on(engine, DATA[:2])
        assert saving != "moves" or 0 < num_moved(engine) < len(trained_sections(engine))
        params = dict(engine.module.named_parameters())
        local = []
        for param in params.values():
            safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 1.5)
            safe_set_full_optimizer_state(param, safe_get_full_optimizer_state(param, "exp_avg") * 2, "exp_avg")
            local.append(safe_get_full_fp32_param(param))
        with zerolith.zero.GatheredParameters([params["norm.weight"]], modifier_rank=0):
            if engine.global_rank == 0:
                params["norm.weight"].data.mul_(2)
        train_on(engine, DATA[2:3])
        for include in (["optim_states"], ["hp_params"], None):
            engine.offload_states(include)
            engine.reload_states()
        for param in params.values() if stage == 3 else ():
            part = zerolith.zero.safe_get_local_fp32_param(param)
            safe_set_local_fp32_param(param, part + 0.125)
        train_on(engine, DATA[3:4])
        engine.save_checkpoint(tmp_path / str(number))
        states = engine.optimizer.state_dict()["state"]
        engine.destroy()
        engine = started(loading)
        engine.load_checkpoint(tmp_path / str(number))
        losses = train_on(engine, DATA[4:])
        assert loading != "moves" or num_moved(engine)
        engine.load_checkpoint(tmp_path / str(number))
        assert_same(train_on(engine, DATA[4:]), losses)
        return local, states, losses, result_of(engine, "exp_avg")

    def started(how: str, **more: Any) -> Any:
        free = [SOME // 2 + 60_000, PLENTY]
        monkeypatch.setattr(filling, "gauge_of", lambda device: Gauge(free) if how == "moves" else None)
        return start(stage, device="none" if how == "none" else "cpu", **PRECISIONS[precision], **more)

    expected = run_ranks(2, body, 0, "none", "none")
    for number, (saving, loading) in enumerate([("moves", "none"), ("none", "moves"), ("moves", "moves")]):
        assert_same(run_ranks(2, body, number + 1, saving, loading), expected)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("stage", [1, 3])
def test_what_moves_is_split_where_the_others_are(stage: int, overlap: str, room: Callable[..., None]) -> None:
    def body(splits: bool) -> Any:
        engine = start(stage, overlap, bf16={"enabled": True, "split_master": splits}, integrity_interval=integrity)
        losses, seen = [], []
        for batch in DATA:
            losses += train_on(engine, batch[None])
            seen.append(num_moved(engine))
            assert not splits or [each.is_split for each in trained_sections(engine)] == [
                not each.is_offloaded for each in trained_sections(engine)
            ]
        assert not splits or 0 < seen[1] < seen[3] == len(trained_sections(engine))
        engine.offload_states()
        engine.reload_states()
        return losses, engine.optimizer.state_dict()["state"], result_of(engine, "exp_avg")

    integrity = 0 if overlap == "backward" else 1
    expected = run_ranks(2, body, False)
    room(SOME // 2 + 40_000, PLENTY)
    assert_same(run_ranks(2, body, True), expected)


def test_a_state_dict_goes_from_before_to_after_a_move(room: Callable[..., None]) -> None:
    room(SOME, PLENTY)
    engine = start(2, bf16={"enabled": True, "split_master": True})
    train_on(engine, DATA[:1])
    saved = copy.deepcopy(engine.optimizer.state_dict())

    def states() -> list[Tensor | None]:
        return [safe_get_full_optimizer_state(param, "exp_avg").clone() for param in engine.module.parameters()]

    expected = states()
    train_on(engine, DATA[1:2])
    assert 0 < num_moved(engine) < len(trained_sections(engine))
    engine.optimizer.load_state_dict(saved)
    assert_same(states(), expected)
    train_on(engine, DATA[2:5])
    assert num_moved(engine) == len(trained_sections(engine))
    engine.destroy()


# --- memory -------------------------------------------------------------------------------------


def tensors_of(engine: Any, section: Section) -> Iterator[Tensor]:
    """Masters and states."""
    optimizer = engine._partitioned
    own = engine._sharded.gradients_of(section)
    yield section.main.data
    for piece in optimizer.pieces[own]:
        yield piece.param
        yield from (value for key, value in optimizer.state_of(piece.param).items() if key != "step")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_stays_where_it_was(stage: int, precision: str, room: Callable[..., None]) -> None:
    room(PLENTY, PLENTY)
    engine = start(stage, "none", **PRECISIONS[precision])
    train_on(engine, DATA[:1])
    sections, optimizer = trained_sections(engine), engine._partitioned
    pieces = {id(piece.param) for pieces in optimizer.pieces.values() for piece in pieces}
    steps = [optimizer.state_of(piece.param)["step"] for pieces in optimizer.pieces.values() for piece in pieces]
    before = [
        StorageWeakRef(tensor.untyped_storage()) for section in sections for tensor in tensors_of(engine, section)
    ]
    addresses = {section: {tensor.data_ptr() for tensor in tensors_of(engine, section)} for section in sections}
    assert not any(section.main.shares_memory_with(section.weights) for section in sections)
    train_on(engine, DATA[1:2])
    assert num_moved(engine) == len(sections)
    assert all(each.expired() for each in before)
    for section in sections:
        tensors = list(tensors_of(engine, section))
        assert section.main.shares_memory_with(section.weights) == (precision == "fp32")
        if precision == "bf16":
            assert section.main.data.data_ptr() not in addresses[section]
        assert all(tensor.device == section.weights.data.device for tensor in tensors)
        own = engine._sharded.gradients_of(section)
        assert all(section.main.holds(piece.param) for piece in optimizer.pieces[own])
        assert not own.runs_behind
    assert {id(piece.param) for pieces in optimizer.pieces.values() for piece in pieces} == pieces
    assert [optimizer.state_of(p.param)["step"] for pieces in optimizer.pieces.values() for p in pieces] == steps
    assert "in host memory" not in str(engine.summary())
    engine.destroy()


def test_what_is_weights_from_now_on_is_not_stepped_in_backward(room: Callable[..., None]) -> None:
    """Below stage 3 it is in sight, so it must wait for step()."""
    room(PLENTY, PLENTY)
    for precision, begins in (("fp32", False), ("bf16", True)):
        engine = start(2, "backward", **PRECISIONS[precision])
        assert engine._partitioned.ahead.eligible
        train_on(engine, DATA[:2])
        assert bool(engine._partitioned.ahead.eligible) == begins
        engine.destroy()


# --- who decides --------------------------------------------------------------------------------


def test_ranks_with_different_room_bring_the_same_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    def gauge_of(device: torch.device) -> Gauge:
        return Gauge([(SOME // 2 + 60_000, PLENTY)[dist.get_rank()], (PLENTY, 0)[dist.get_rank()]])

    def body() -> int:
        engine = start(3)
        train_on(engine, DATA)
        assert 0 < num_moved(engine) < len(trained_sections(engine))
        return num_moved(engine)

    monkeypatch.setattr(filling, "gauge_of", gauge_of)
    one, other = run_ranks(2, body)
    assert one == other


def test_memory_in_too_small_pieces_on_one_rank_ends_it_on_all(room: Callable[..., None]) -> None:
    def body(fails: bool) -> Any:
        engine = start(3)
        copy, calls = filling.Filling._copy, []

        def copied(self: Any, own: Any) -> Any:
            calls.append(own)
            with pytest.MonkeyPatch.context() as patch:
                if len(calls) == 3 and engine.global_rank == 1:
                    patch.setattr(Tensor, "to", full)
                return copy(self, own)

        def full(*args: Any, **kwargs: Any) -> Tensor:
            raise torch.OutOfMemoryError("no room")

        if fails:
            engine._filling._copy = partial(copied, engine._filling)
        train_on(engine, DATA[:3])
        assert num_moved(engine) == (2 if fails else 0)
        return result_of(engine, "exp_avg")

    expected = run_ranks(2, body, False)
    room(PLENTY, PLENTY)
    assert_same(run_ranks(2, body, True), expected)


def third_party(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    class Own(torch.optim.SGD):
        granularity = "element"

    return Own(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "more",
    [
        {"offload": {"ratio": 1.0}},
        {"offload": {"hbm_first": False}},
        {"device": "none"},
        {"make": third_party},
        {"make": OPTIMIZERS["SGD"], "reproducible": True},
    ],
    ids=["a ratio", "switched off", "nothing is offloaded", "not known", "must be the same bits"],
)
def test_who_is_left_alone(more: dict[str, Any], room: Callable[..., None]) -> None:
    room(PLENTY, PLENTY)
    engine = start(1, **more)
    assert engine._filling is None
    engine.destroy()


def test_states_on_disk_stay_there(room: Callable[..., None], tmp_path: Path) -> None:
    room(PLENTY, PLENTY)
    engine = start(1, device="nvme", offload={"nvme_path": str(tmp_path)})
    assert engine._filling is None
    engine.destroy()


def test_our_kernels_step_the_same_bits_anywhere(room: Callable[..., None]) -> None:
    room(PLENTY, PLENTY)
    engine = start(1, reproducible=True)
    assert engine._filling is not None
    engine.destroy()


def test_the_cpu_is_no_device_beside_the_host() -> None:
    engine = start(1)
    assert engine._filling is None
    engine.destroy()


def test_one_line_says_what_has_come(room: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    room(0, SOME)
    caplog.set_level(logging.INFO, "zerolith")
    engine = start(3)
    train_on(engine, DATA[:3])
    assert "offloaded sections" not in caplog.text
    train_on(engine, DATA[3:])
    (line,) = [record.getMessage() for record in caplog.records if "offloaded sections" in record.getMessage()]
    moved, total = num_moved(engine), len(trained_sections(engine))
    assert line.startswith(f"{moved} of {total} offloaded sections come to the device: ")
    assert line.endswith(" are left at the peak")
    assert "% of masters and states in host memory" in str(engine.summary())
    engine.destroy()
