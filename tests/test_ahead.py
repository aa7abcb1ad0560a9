"""Updates that begin in backward: the same bits, gradients whose memory goes, and an error where that cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import (
    PRECISIONS,
    assert_same,
    make_gpt,
    my_pieces,
    sgd,
    train_on,
    whole_masters,
    whole_weights,
)
from overlapping import DATA, PATIENCE_S, config_for, start
from unusual import CASES, config_for as unusual_config_for, inputs, train_sharded
from zerolith.errors import ConfigError, OffloadError, UsageError
from zerolith.optim import PartitionedOptimizer
from zerolith.zero import safe_get_full_fp32_param, safe_get_full_grad

USED_IN_PARTS = ("gradient penalty first", "shared, reentrant checkpoints")  # in more than one backward of a step
BF16 = {"bf16": {"enabled": True}}


def up_to_step(engine: Any, batch: Tensor) -> None:
    """All of a global batch but its step."""
    for piece in my_pieces(batch, engine):
        engine.backward(engine(piece))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sections whose updates began in backward."""
    names: list[str] = []
    real = PartitionedOptimizer._begin_ahead

    def begin(optimizer: PartitionedOptimizer, own: Any, *more: Any) -> None:
        names.append(own.section.name)
        real(optimizer, own, *more)

    monkeypatch.setattr(PartitionedOptimizer, "_begin_ahead", begin)
    return names


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_when_updates_begin_changes_no_bit(
    stage: int, precision: str, device: str, tmp_path: Path, begun: list[str]
) -> None:
    def body(overlap: str) -> Any:
        begun.clear()
        engine = start(overlap, tmp_path, stage=stage, device=device, **PRECISIONS[precision])
        losses = train_on(engine, DATA)
        layouts = [own.section.layout for own in engine._sharded.gradients]
        num_sections = sum(
            any(layout.owned(index, engine.global_rank).numel for index in range(len(layout.slots)))
            for layout in layouts
        )
        result = losses, whole_weights(engine), whole_masters(engine), engine.get_lr(), engine.get_global_grad_norm()
        engine.destroy()
        return result, len(begun) / num_sections

    # At stages 1 and 2 weights are in sight: they are not touched before the step, nor is disk read twice.
    is_early = stage == 3 or (precision == "bf16" and device != "nvme")
    for world in (1, 2):
        some, others = run_ranks(world, body, "backward"), run_ranks(world, body, "none")
        assert_same([result for result, _ in some], [result for result, _ in others])
        assert {count for _, count in some} == {len(DATA) if is_early else 0}
        assert {count for _, count in others} == {0}


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_that_are_remainders(stage: int, tmp_path: Path, begun: list[str]) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=stage, device="none", bf16={"enabled": True, "split_master": True})
        return train_on(engine, DATA), whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


def test_four_ranks_with_weights_on_disk_too(tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        config = config_for(overlap, tmp_path / "states", device="nvme", **BF16)
        config["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path / "weights")}
        config["train_micro_batch_size_per_gpu"] = 1
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        return train_on(engine, DATA), whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(4, body, "backward"), run_ranks(4, body, "none"))


@pytest.mark.parametrize("name", ["SGD", "Lion", "Adagrad", "RAdam", "Muon", "Adafactor"])
def test_every_optimizer(name: str, tmp_path: Path) -> None:
    """Muon and Adafactor step whole tensors, which need all ranks: they wait for the step."""

    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, optimizer={"type": name, "params": {"lr": 1e-2}})
        found = []
        for batch in DATA:
            found.append((train_on(engine, batch[None]), engine.get_global_grad_norm()))
        return found, whole_weights(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


def test_step_hooks_see_gradients_and_results(tmp_path: Path, begun: list[str]) -> None:
    def body(overlap: str) -> Any:
        engine, seen = start(overlap, tmp_path), []
        inner = engine.basic_optimizer

        def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad.mul_(0.5)

        handles = [inner.register_step_pre_hook(halve)]
        handles += [inner.register_step_post_hook(lambda *_: seen.append(whole_masters(engine)))]
        losses = train_on(engine, DATA[:2])
        assert len(seen) == 2
        assert not begun
        for handle in handles:
            handle.remove()
        return losses + train_on(engine, DATA[2:]), seen, whole_weights(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


@pytest.mark.parametrize("name", CASES)
def test_unusual_modules_train_the_same_bits_or_are_refused(name: str) -> None:
    def body(overlap: str) -> Any:
        torch.manual_seed(0)
        config = unusual_config_for(3, gradient_clipping=0.0)
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "overlap": overlap}
        try:
            return train_sharded(CASES[name](), sgd, inputs(2), config)
        except UsageError as error:
            assert overlap == "backward"
            return str(error)

    found = run_ranks(2, body, "backward")
    if name in USED_IN_PARTS:
        assert all("came when it had been updated" in text or "is updated already" in text for text in found), found
    else:
        assert_same(found, run_ranks(2, body, "none"))


def test_a_parameter_without_a_gradient_stays_as_it_is(tmp_path: Path) -> None:
    """On this rank: the others may have one for it."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            for number, layer in enumerate(self.layers):
                if number != 1 or (self.steps % 3 and (self.steps % 2 or not x.sum() > 0)):
                    x = x + layer(x)
            return x.square().mean()

    def body(overlap: str) -> Any:
        torch.manual_seed(0)
        config = config_for(overlap, tmp_path, gradient_accumulation_steps=1)
        engine = zerolith.initialize(model=Sometimes(), config=config)[0]
        for step in range(7):
            x = torch.full((2, 64), 1.0 if engine.global_rank else -1.0) + step
            engine.backward(engine(x))
            engine.step()
        return whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


# --- when ---------------------------------------------------------------------------------------


def test_an_update_begins_while_backward_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updated = threading.Event()
    real = PartitionedOptimizer._step_together

    def step(optimizer: PartitionedOptimizer, used: Any, *more: Any) -> None:
        real(optimizer, used, *more)
        if any(own.section.name.startswith("blocks.2") for own in used):
            updated.set()

    monkeypatch.setattr(PartitionedOptimizer, "_step_together", step)
    engine = start("backward", tmp_path, gradient_accumulation_steps=1, train_micro_batch_size_per_gpu=8)

    def wait(*_: Any) -> None:
        assert updated.wait(PATIENCE_S), "backward went on, and no update began"

    engine.module.blocks[0].register_full_backward_pre_hook(wait)
    for batch in DATA[:2]:
        updated.clear()
        engine.backward(engine(batch))
        assert updated.is_set()
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_no_gradient_stays(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    real = PartitionedOptimizer._step_together

    def slowly(*args: Any) -> None:
        time.sleep(0.02)  # backward is faster, and waits
        real(*args)

    monkeypatch.setattr(PartitionedOptimizer, "_step_together", slowly)

    def held(engine: Any) -> int:
        return sum(tensor.nbytes for own in engine._sharded.gradients for tensor in own.held())

    for overlap in ("none", "backward"):
        alone = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
        engine = start(overlap, tmp_path, stage=stage, **alone, **BF16)
        assert (engine.summary().bytes_per_rank["gradients"] == 0) == (overlap == "backward")
        of_sections = sorted(own.section.layout.numel * 4 for own in engine._sharded.gradients)

        def measure(*_: Any, engine: Any = engine) -> None:
            most[0] = max(most[0], held(engine))

        for block in engine.module.blocks:
            block.register_full_backward_pre_hook(measure)
        up_to_step(engine, DATA[0])
        measure()
        if overlap == "none":
            assert most[0] >= sum(of_sections)
        else:
            # A unit's terms; and of sections: two whose updates are under way, and one in transit.
            of_units = [sum(section.layout.numel for section in unit.sections) for unit in engine._sharded.units]
            assert most[0] <= max(of_units) * 2 + sum(of_sections[-3:])
            engine._partitioned._behind.settle_all()
            assert held(engine) == 0
        most[0] = 0
        engine.step()
        engine.destroy()


# --- between backward and step --------------------------------------------------------------------


def evaluate(engine: Any, folder: Path) -> None:
    with torch.no_grad():
        engine(DATA[0][:2])


def call_the_module(engine: Any, folder: Path) -> None:
    if engine.zero_optimization_stage() < 3:
        raise UsageError("call step() first")  # there its weights are those of the step before
    engine.module(DATA[0][:2])


def another_backward(engine: Any, folder: Path) -> None:
    engine.backward(torch.ones((), requires_grad=True))


def save(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(folder)


def drop_gradients(engine: Any, folder: Path) -> None:
    engine.zero_grad()


def read_a_master(engine: Any, folder: Path) -> None:
    safe_get_full_fp32_param(next(engine.module.parameters()))


def read_a_gradient(engine: Any, folder: Path) -> None:
    safe_get_full_grad(next(engine.module.parameters()))


def read_a_state_dict(engine: Any, folder: Path) -> None:
    engine.module.state_dict()


def read_the_optimizer(engine: Any, folder: Path) -> None:
    engine.optimizer.state_dict()


def decide_by_hand(engine: Any, folder: Path) -> None:
    engine.set_gradient_accumulation_boundary(False)


def gather(engine: Any, folder: Path) -> None:
    if engine.zero_optimization_stage() < 3:
        raise UsageError("call step() first")
    with zerolith.zero.GatheredParameters(list(engine.module.parameters())):
        pass


def lend(engine: Any, folder: Path) -> None:
    engine.offload_states()


BETWEEN = [
    evaluate, call_the_module, another_backward, save, drop_gradients, read_a_master, read_a_gradient,
    read_a_state_dict, read_the_optimizer, decide_by_hand, gather, lend,
]  # fmt: skip


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("act", BETWEEN)
def test_nothing_comes_between_backward_and_step(act: Callable[[Any, Path], None], stage: int, tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=stage, **BF16)
        train_on(engine, DATA[:1])
        up_to_step(engine, DATA[1])
        if overlap == "backward":
            with pytest.raises(UsageError, match=r"call (it|step\(\)) "):
                act(engine, tmp_path)
        engine.step()
        losses = train_on(engine, DATA[2:])
        return losses, whole_weights(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


def change_the_rate(engine: Any) -> None:
    engine.optimizer.param_groups[0]["lr"] = 0.5


def edit_a_weight(engine: Any) -> None:
    with torch.no_grad():
        next(engine.module.parameters()).add_(1)


@pytest.mark.parametrize(("act", "words"), [(change_the_rate, "learning rate"), (edit_a_weight, "edited between")])
def test_what_the_step_should_have_known_before_is_an_error(
    act: Callable[[Any], None], words: str, tmp_path: Path
) -> None:
    def body() -> Any:
        engine = start("backward", tmp_path, stage=2, **BF16)
        engine.save_checkpoint(tmp_path)
        up_to_step(engine, DATA[0])
        act(engine)
        with pytest.raises(UsageError, match=words):
            engine.step()
        with pytest.raises(UsageError, match="load a checkpoint"):
            engine(DATA[0][:2])
        engine.load_checkpoint(tmp_path)
        return train_on(engine, DATA), whole_weights(engine)

    def undisturbed() -> Any:
        engine = start("none", tmp_path, stage=2, **BF16)
        return train_on(engine, DATA), whole_weights(engine)

    assert_same(run_ranks(2, body), run_ranks(2, undisturbed))


@pytest.mark.parametrize("stage", [2, 3])
def test_edits_before_the_backward_are_kept(stage: int, tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=stage, **BF16)
        for number, batch in enumerate(DATA):
            params = list(engine.module.parameters())
            with zerolith.zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
                params[number].mul_(0.5)
            if stage == 2:
                with torch.no_grad():
                    params[number + 1].add_(0.25)
            train_on(engine, batch[None])
        return whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


# --- gradients that are not finite, and faults ------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_skips_the_step(stage: int, tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=stage, gradient_accumulation_steps=1, **BF16)
        losses = train_on(engine, DATA[:2])
        loss = engine(DATA[2][:2])
        engine.backward(loss * (float("nan") if engine.global_rank == 1 else 1.0))
        engine.step()
        assert not engine.was_step_applied()
        assert engine.skipped_steps == 1
        return losses + train_on(engine, DATA[3:]), whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


class Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


def spoil(engine: Any) -> Any:
    """From now on what comes to the first block in backward is not finite; returns what undoes it."""
    return engine.module.blocks[0].register_forward_hook(lambda module, args, output: Spoilt.apply(output))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_when_others_were_used_is_an_error(stage: int, tmp_path: Path) -> None:
    def body() -> Any:
        engine = start("backward", tmp_path, stage=stage, **BF16)
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path)
        handle = spoil(engine)
        up_to_step(engine, DATA[1])
        with pytest.raises(UsageError, match=r"the gradient of .* is not finite, and others have been used"):
            engine.step()
        with pytest.raises(UsageError, match="load a checkpoint"):
            engine.backward(torch.ones((), requires_grad=True))
        handle.remove()
        engine.load_checkpoint(tmp_path)
        return train_on(engine, DATA[1:]), whole_weights(engine)

    def undisturbed() -> Any:
        engine = start("none", tmp_path, stage=stage, **BF16)
        return train_on(engine, DATA)[2:], whole_weights(engine)

    assert_same(run_ranks(2, body), run_ranks(2, undisturbed))


def test_who_does_not_check_steps_with_what_is_not_finite(tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, bf16={"enabled": True, "check_grad_overflow": False})
        spoil(engine)
        train_on(engine, DATA[:2])
        weights = whole_weights(engine)
        return {name: torch.isnan(value) for name, value in weights.items()}, {
            name: value.nan_to_num() for name, value in weights.items()
        }

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


def test_a_backward_that_fails_leaves_a_mixture(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in the midst")

    def body() -> Any:
        engine = start("backward", tmp_path)
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path)
        handle = engine.module.blocks[0].register_full_backward_pre_hook(fail)
        pieces = list(my_pieces(DATA[1], engine))
        handle.remove()
        engine.backward(engine(pieces[0]))
        handle = engine.module.blocks[0].register_full_backward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            engine.backward(engine(pieces[1]))
        handle.remove()
        engine.reset()
        with pytest.raises(UsageError, match="a backward that had begun to update was given up"):
            engine(pieces[0])
        engine.load_checkpoint(tmp_path)
        return train_on(engine, DATA[1:]), whole_weights(engine)

    def undisturbed() -> Any:
        engine = start("none", tmp_path)
        return train_on(engine, DATA)[2:], whole_weights(engine)

    assert_same(run_ranks(2, body), run_ranks(2, undisturbed))


@pytest.mark.parametrize("operation", ["pwrite", "preadv"])
def test_a_disk_that_fails_ends_all_ranks(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    def body() -> Any:
        engine = start("backward", tmp_path / "swap", device="nvme", **BF16)
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path / "checkpoints")
        if engine.global_rank == 1:
            monkeypatch.setattr(f"os.{operation}", failing)
        with pytest.raises(OffloadError, match="Input/output error while"):
            train_on(engine, DATA[1:3])
        monkeypatch.undo()
        with pytest.raises(UsageError, match="load a checkpoint"):
            engine.save_checkpoint(tmp_path / "never")
        engine.load_checkpoint(tmp_path / "checkpoints")
        return train_on(engine, DATA[1:3]), whole_weights(engine)

    def undisturbed() -> Any:
        engine = start("none", tmp_path, **BF16)
        return train_on(engine, DATA[:3])[2:], whole_weights(engine)

    assert_same(run_ranks(2, body), run_ranks(2, undisturbed))


def test_the_end_of_an_engine_between_backward_and_step(tmp_path: Path) -> None:
    engine = start("backward", tmp_path)
    model = engine.module
    train_on(engine, DATA[:1])
    up_to_step(engine, DATA[1])
    engine.destroy()
    assert all(torch.isfinite(param.local).all() for param in model.parameters())
    assert not [thread for thread in threading.enumerate() if "optimizer" in thread.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"managed_gradient_accumulation": False}, "which backward is a step's last"),
        ({"integrity_interval": 5}, "what integrity_interval compares"),
        ({"stage": 0}, "choose stage 1, 2 or 3"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = config_for("backward", tmp_path, device="none", **change)
    if "stage" in change:
        config["zero_optimization"]["stage"] = change["stage"]
    with pytest.raises(ConfigError, match=words) as caught:
        zerolith.config.load_config(config)
    assert 'zero_optimization.offload_optimizer.overlap: "backward"' in str(caught.value)


class Partly(nn.Module):
    """A stack of layers, of which `without_bias` do not use their bias for now."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(64, 64) / 8), nn.Parameter(torch.zeros(64))
            self.without_bias = False

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.linear(x, self.weight)
            return y if self.without_bias else y + self.bias

    def __init__(self, *without_bias: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer() for _ in range(6))
        for number in without_bias:
            self.layers[number].without_bias = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def start_partly(overlap: str, folder: Path, *without_bias: int, **more: Any) -> Any:
    config = config_for(overlap, folder, gradient_accumulation_steps=1, **more)
    config["zero_optimization"]["reduce_bucket_size"] = 10**6
    return zerolith.initialize(model=Partly(*without_bias), config=config)[0]


X = torch.ones(4, 64)


def test_the_thread_is_alone_with_what_it_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are cut, and the client's optimizer steps, while no section is being updated."""
    under_way = [0]
    update, hand_over = PartitionedOptimizer._update_one, PartitionedOptimizer._hand_over
    together = PartitionedOptimizer._step_together

    def slowly(*args: Any) -> None:
        under_way[0] += 1
        time.sleep(0.02)
        update(*args)
        under_way[0] -= 1

    def alone(*args: Any) -> None:
        assert not under_way[0]
        hand_over(*args)

    def step(optimizer: PartitionedOptimizer, used: Any, inner: Any, factor: float) -> None:
        assert inner is not optimizer.inner or not under_way[0]
        together(optimizer, used, inner, factor)

    monkeypatch.setattr(PartitionedOptimizer, "_update_one", slowly)
    monkeypatch.setattr(PartitionedOptimizer, "_hand_over", alone)
    monkeypatch.setattr(PartitionedOptimizer, "_step_together", step)
    results = []
    for overlap in ("backward", "none"):
        config = config_for(overlap, tmp_path, device="nvme", gradient_accumulation_steps=1)
        config["zero_optimization"]["reduce_bucket_size"] = 10**6
        config["zero_optimization"]["offload_optimizer"]["ratio"] = 0.83
        engine = zerolith.initialize(model=Partly(), config=config)[0]
        for number in range(5):
            engine.module.layers[0].without_bias = number == 2
            engine.backward(engine(X))
            engine.step()
        results.append((whole_weights(engine), whole_masters(engine)))
        engine.destroy()
    assert_same(*results)


def test_nothing_is_brought_for_an_update_that_was_made(tmp_path: Path) -> None:
    engine = start("backward", tmp_path, device="nvme", **BF16)
    train_on(engine, DATA)
    engine._partitioned._behind.settle_all()
    assert not engine._partitioned.residency._reads
    engine.destroy()


@pytest.mark.parametrize("overlap", ["none", "backward"])
def test_masters_are_made_from_the_weights_as_they_are_when_used(overlap: str, tmp_path: Path) -> None:
    engine = start(overlap, tmp_path, device="none", bf16={"enabled": True, "split_master": True})
    train_on(engine, DATA[:3])
    engine._partitioned._behind.settle_all()
    assert not engine._partitioned.residency._reads
    engine.destroy()


def test_ranks_that_began_different_sections_learn_the_same(tmp_path: Path) -> None:
    def body() -> None:
        unused = range(6) if dist.get_rank() else ()
        engine = start_partly("backward", tmp_path, *unused)
        engine.backward(engine(X))
        assert bool(engine._partitioned.ahead.begun) == (engine.global_rank == 0)
        change_the_rate(engine)
        with pytest.raises(UsageError, match="learning rate"):
            engine.step()
        engine.reset()
        with pytest.raises(UsageError, match="load a checkpoint"):
            engine(X)

    run_ranks(2, body)


def test_a_backward_that_fails_is_a_mixture_on_ranks_that_began_nothing(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in the midst")

    def body() -> None:
        unused = range(6) if dist.get_rank() else ()
        engine = start_partly("backward", tmp_path, *unused)
        engine.module.layers[0].register_full_backward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            engine.backward(engine(X))
        assert bool(engine._partitioned.ahead.begun) == (engine.global_rank == 0)
        engine.reset()
        with pytest.raises(UsageError, match="a backward that had begun to update was given up"):
            engine(X)

    run_ranks(2, body)


def test_late_gradients_are_no_error_where_nothing_began() -> None:
    """A model that cannot be updated in backward trains on while somebody looks on."""

    def body(overlap: str) -> Any:
        torch.manual_seed(0)
        config = unusual_config_for(3, gradient_clipping=0.0)
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "overlap": overlap}

        def watched(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = sgd(model)
            optimizer.register_step_post_hook(lambda *_: None)
            return optimizer

        return train_sharded(CASES["shared, reentrant checkpoints"](), watched, inputs(2), config)

    assert_same(run_ranks(2, body, "backward"), run_ranks(2, body, "none"))


@pytest.mark.parametrize("stage", [2, 3])
def test_an_interrupt_in_a_step_leaves_a_mixture(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    engine = start("backward", tmp_path, stage=stage, **BF16)
    engine.save_checkpoint(tmp_path)
    up_to_step(engine, DATA[0])
    with monkeypatch.context() as patch:
        patch.setattr("zerolith.engine.examine", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    with pytest.raises(UsageError, match="load a checkpoint"):
        engine(DATA[0])
    engine.load_checkpoint(tmp_path)
    undisturbed = start("none", tmp_path, stage=stage, **BF16)
    assert_same(train_on(engine, DATA), train_on(undisturbed, DATA))
    engine.destroy()
    undisturbed.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_an_update_that_fails_ends_all_ranks_before_weights_are_shown(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PartitionedOptimizer._update_one, [0]

    def failing(optimizer: PartitionedOptimizer, *more: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 and optimizer.comm.rank == 1:
            raise ArithmeticError("no such number")
        real(optimizer, *more)

    monkeypatch.setattr(PartitionedOptimizer, "_update_one", failing)

    def body() -> None:
        engine = start("backward", tmp_path, stage=stage, **BF16)
        before = {name: param.detach().clone() for name, param in engine.module.named_parameters() if stage == 2}
        up_to_step(engine, DATA[0])
        with pytest.raises(OffloadError, match="no such number"):
            engine.step()
            engine.backward(engine(DATA[1][:2]))
        with pytest.raises(UsageError, match="load a checkpoint"):
            engine(DATA[1][:2])
        now = dict(engine.module.named_parameters())
        assert all(torch.equal(value, now[name]) for name, value in before.items())

    run_ranks(2, body)
