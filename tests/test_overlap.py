"""Updates that run behind the next forward: the same bits, and nobody sees what they have half done."""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import (
    PRECISIONS,
    assert_same,
    make_gpt,
    sgd,
    train_on,
    whole_masters,
    whole_weights,
)
from overlapping import DATA, PATIENCE_S, config_for as config_without_clipping, start as start_without_clipping
from unusual import CASES, config_for as unusual_config_for, inputs, train_sharded
from zerolith.errors import OffloadError, UsageError
from zerolith.optim import PartitionedOptimizer
from zerolith.zero import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
)

config_for = partial(config_without_clipping, gradient_clipping=0.5)
start = partial(start_without_clipping, gradient_clipping=0.5)


class Slow:
    """Lets every update that runs behind wait for `before` first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], None]) -> None:
        self.seen: list[Any] = []  # sections, as they were updated behind
        real = PartitionedOptimizer._step_together

        def step(optimizer: PartitionedOptimizer, used: Any, inner: Any, factor: float) -> None:
            if inner is not optimizer.inner:
                (own,) = used
                before(own.section)
                self.seen.append(own.section)
            real(optimizer, used, inner, factor)

        monkeypatch.setattr(PartitionedOptimizer, "_step_together", step)


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Each update takes a while, on no two ranks the same."""
    return Slow(monkeypatch, lambda section: time.sleep(0.004 * (1 + zerolith_rank())))


def zerolith_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "device", "precision"),
    [
        (stage, device, each)
        for stage, device in [(1, "nvme"), (2, "cpu"), (3, "cpu"), (3, "nvme")]
        for each in PRECISIONS
    ],
)
def test_when_updates_run_changes_no_bit(
    stage: int, device: str, precision: str, tmp_path: Path, lagging: Slow
) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, device=device, stage=stage, **PRECISIONS[precision])
        losses = train_on(engine, DATA)
        assert bool(lagging.seen) == (overlap == "forward")
        result = losses, whole_weights(engine), whole_masters(engine), engine.get_lr()
        engine.destroy()
        return result

    for world in (1, 2):
        assert_same(run_ranks(world, body, "forward"), run_ranks(world, body, "none"))


def test_four_ranks_with_weights_on_disk_too(tmp_path: Path, lagging: Slow) -> None:
    def body(overlap: str) -> Any:
        config = config_for(overlap, tmp_path / "states", device="nvme", bf16={"enabled": True})
        config["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path / "weights")}
        config["train_micro_batch_size_per_gpu"] = 1
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        return train_on(engine, DATA), whole_weights(engine), whole_masters(engine)

    assert_same(run_ranks(4, body, "forward"), run_ranks(4, body, "none"))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW, tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), foreach=False),
    "two groups": lambda params: torch.optim.Adam(
        [{"params": params[1::2], "weight_decay": 0.1}, {"params": params[::2], "lr": 3e-3}], lr=1e-2
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers_and_schedulers_of_the_client(name: str, tmp_path: Path, lagging: Slow) -> None:
    def body(overlap: str) -> Any:
        config = config_for(overlap, tmp_path, bf16={"enabled": True})
        del config["optimizer"], config["scheduler"]
        model = make_gpt()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's, of schedulers that come before steps
            engine = zerolith.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]
            losses = train_on(engine, DATA)
        assert bool(lagging.seen) == (overlap == "forward")
        return losses, whole_weights(engine)

    assert_same(run_ranks(2, body, "forward"), run_ranks(2, body, "none"))


def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad.mul_(0.5)


def test_who_looks_on_at_steps_sees_gradients_and_results(tmp_path: Path, lagging: Slow) -> None:
    def body(overlap: str) -> Any:
        engine, seen = start(overlap, tmp_path), []
        inner = engine.basic_optimizer
        losses = train_on(engine, DATA[:2])
        handles = [inner.register_step_pre_hook(halve)]
        handles += [inner.register_step_post_hook(lambda *_: seen.append(whole_masters(engine)))]
        losses += train_on(engine, DATA[2:4])
        assert len(seen) == 2
        for handle in handles:
            handle.remove()
        return losses + train_on(engine, DATA[4:]), seen, whole_weights(engine)

    assert_same(run_ranks(2, body, "forward"), run_ranks(2, body, "none"))


class Counting(torch.optim.SGD):
    """Keeps something in itself, as an optimizer of torch never does."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


def test_optimizers_of_others_are_stepped_in_step(tmp_path: Path) -> None:
    config = config_for("forward", tmp_path)
    del config["optimizer"], config["scheduler"]
    model = make_gpt()
    optimizer = Counting(model.parameters(), lr=0.1)
    engine = zerolith.initialize(model=model, optimizer=optimizer, config=config)[0]
    train_on(engine, DATA[:3])
    assert optimizer.count == 3


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_unusual_modules_on_ranks_of_different_speed(name: str, stage: int, tmp_path: Path, lagging: Slow) -> None:
    def body(overlap: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        offload = {"offload_optimizer": {"device": "cpu", "overlap": overlap}}
        config = unusual_config_for(stage, zero_optimization=offload)
        return train_sharded(CASES[name](), sgd, inputs(2), config)

    assert_same(run_ranks(2, body, "forward"), run_ranks(2, body, "none"))


# --- behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_blocks_forward_waits_for_its_own_update_only(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates of later blocks cannot begin before the first has computed."""
    passed = threading.Event()

    def before(section: Any) -> None:
        if section.name.startswith(("blocks.1", "blocks.2")):
            assert passed.wait(PATIENCE_S), "this block's forward waited for another's update"

    slow = Slow(monkeypatch, before)
    engine = start("forward", tmp_path, stage=stage, bf16={"enabled": True})
    engine.module.blocks[0].register_forward_hook(lambda *_: passed.set())
    train_on(engine, DATA[:1])
    passed.clear()
    assert engine.global_steps == 1, "step() did not wait either"
    engine(DATA[1][:4])
    assert passed.is_set()
    engine._partitioned._behind._thread.submit(lambda: None).result(PATIENCE_S)  # after all updates
    assert not any(own.held() for own in engine._sharded.gradients), "gradients go as they are used"
    names = [section.name for section in slow.seen]
    assert names == [section.name for section in engine._sharded.sections], "in the order of forward"
    engine.destroy()


# --- in between ---------------------------------------------------------------------------------


def read_masters(engine: Any, folder: Path) -> Any:
    return [safe_get_full_fp32_param(param) for param in engine.module.parameters()]


def read_local_parts(engine: Any, folder: Path) -> Any:
    params = list(engine.module.parameters())
    return [(safe_get_local_fp32_param(p), safe_get_local_optimizer_state(p, "exp_avg")) for p in params]


def read_gradients(engine: Any, folder: Path) -> Any:
    assert all(safe_get_full_grad(param) is None for param in engine.module.parameters())


def read_the_shards_of_a_state_dict(engine: Any, folder: Path) -> Any:
    return {name: value.local.clone() for name, value in engine.module.state_dict().items()}


def read_one_shard(engine: Any, folder: Path) -> Any:
    return engine.module.blocks[2].up.weight.local.clone()


def read_the_shards_of_a_block(engine: Any, folder: Path) -> Any:
    return {name: value.local.clone() for name, value in engine.module.blocks[2].state_dict().items()}


def read_what_was_detached(engine: Any, folder: Path) -> Any:
    return [param.detach().local.clone() for param in engine.module.parameters()]


def load_a_state_dict(engine: Any, folder: Path) -> Any:
    engine.module.load_state_dict(make_gpt(seed=5).state_dict())


def copy_into_a_shard(engine: Any, folder: Path) -> Any:
    with torch.no_grad():
        engine.module.blocks[2].up.weight.copy_(torch.ones(128, 32))


def copy_the_model(engine: Any, folder: Path) -> Any:
    return {name: value.local for name, value in copy.deepcopy(engine.module).named_parameters()}


def edit_gathered(engine: Any, folder: Path) -> Any:
    params = list(engine.module.parameters())
    with zerolith.zero.GatheredParameters(params, modifier_rank=0):
        if engine.global_rank == 0:
            params[3].data.mul_(2)
        with torch.no_grad():
            return [param * 1 for param in params]


def edit_a_master(engine: Any, folder: Path) -> Any:
    safe_set_full_fp32_param(engine.module.blocks[2].down.weight, torch.full((32, 128), 0.01))


def read_the_optimizer(engine: Any, folder: Path) -> Any:
    states = engine.optimizer.state
    params = [param for group in engine.optimizer.param_groups for param in group["params"]]
    return [states[param] for param in params], engine.optimizer.state_dict()["state"]


def save_and_load(engine: Any, folder: Path) -> Any:
    engine.save_checkpoint(folder / "saved")
    engine.load_checkpoint(folder / "saved")


def load_an_older_checkpoint(engine: Any, folder: Path) -> Any:
    engine.load_checkpoint(folder / "first")


def save_16bit(engine: Any, folder: Path) -> Any:
    engine.save_16bit_model(folder / "half")
    return torch.frombuffer(bytearray((folder / "half" / "model.safetensors").read_bytes()), dtype=torch.uint8)


def lend(engine: Any, folder: Path) -> Any:
    engine.offload_states()
    engine.reload_states()


def evaluate(engine: Any, folder: Path) -> Any:
    with torch.no_grad():
        return engine(DATA[0][:2])


def start_over(engine: Any, folder: Path) -> Any:
    engine.reset()


def drop_gradients(engine: Any, folder: Path) -> Any:
    engine.zero_grad()


def only_the_last_block(engine: Any, folder: Path) -> Any:
    """A forward and a backward that some units have no part in."""
    with torch.enable_grad():
        loss = engine.module.blocks[2](torch.ones(1, 4, 32)).square().mean()
        engine.backward(loss)
        engine.step()


BETWEEN = [
    read_masters, read_local_parts, read_gradients, read_the_shards_of_a_state_dict, read_one_shard,
    read_the_shards_of_a_block, read_what_was_detached, load_a_state_dict,
    copy_into_a_shard, copy_the_model, edit_gathered, edit_a_master, read_the_optimizer, save_and_load,
    load_an_older_checkpoint, save_16bit, lend, evaluate, start_over, drop_gradients, only_the_last_block,
]  # fmt: skip


OF_SHARDS = [
    read_the_shards_of_a_state_dict, read_one_shard, read_the_shards_of_a_block, read_what_was_detached, copy_the_model,
]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "stage"), [(act, stage) for act in BETWEEN for stage in (2, 3) if stage == 3 or act not in OF_SHARDS]
)
def test_what_is_done_between_step_and_forward_sees_whole_steps(
    act: Callable[[Any, Path], Any], stage: int, tmp_path: Path, lagging: Slow
) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=stage, integrity_interval=2)
        engine.save_checkpoint(tmp_path / overlap / "first")
        train_on(engine, DATA[:3])
        seen = act(engine, tmp_path / overlap)
        losses = train_on(engine, DATA[3:])
        result = seen, losses, whole_weights(engine), whole_masters(engine)
        engine.destroy()
        return result

    assert_same(run_ranks(2, body, "forward"), run_ranks(2, body, "none"))


def test_the_end_of_an_engine_waits(tmp_path: Path, lagging: Slow) -> None:
    results = []
    for overlap in ("forward", "none"):
        engine = start(overlap, tmp_path)
        model = engine.module
        train_on(engine, DATA[:3])
        engine.destroy()
        results.append({name: param.local.clone() for name, param in model.named_parameters()})
        before = threading.active_count()
    assert_same(*results)
    assert threading.active_count() <= before
    assert not [thread for thread in threading.enumerate() if "optimizer" in thread.name]


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["backward", "save", "lend"])
@pytest.mark.parametrize("operation", ["pwrite", "preadv"])
def test_a_disk_that_fails_behind_ends_all_ranks_at_the_next_call(
    operation: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    def go_on(engine: Any) -> None:
        if call == "save":
            engine.save_checkpoint(tmp_path / "never")
        elif call == "lend":
            engine.offload_states()
        else:
            train_on(engine, DATA[:1])

    def body() -> Any:
        engine = start("forward", tmp_path / "swap", device="nvme", bf16={"enabled": True})
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path / "checkpoints")
        if engine.global_rank == 1:
            monkeypatch.setattr(f"os.{operation}", failing)
        with pytest.raises(OffloadError) as caught:
            train_on(engine, DATA[1:2])  # the disk may fail where states are cut or read ahead already
            engine._partitioned._behind.settle_all()
            go_on(engine)
        monkeypatch.undo()
        with pytest.raises(UsageError, match="the last step failed half-way"):
            engine.save_checkpoint(tmp_path / "never")
        engine.load_checkpoint(tmp_path / "checkpoints")
        losses = train_on(engine, DATA[1:3])
        engine.destroy()
        return str(caught.value), losses

    texts, losses = zip(*run_ranks(2, body), strict=True)
    for text in texts:
        assert "Input/output error while" in text
        assert str(tmp_path / "swap") in text

    def undisturbed() -> list[float]:
        engine = start("none", tmp_path, bf16={"enabled": True})
        return train_on(engine, DATA[:3])[2:]

    assert_same(list(losses), run_ranks(2, undisturbed))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """The second block cannot be updated on rank 0 from the second step on."""
    slow: Slow

    def before(section: Any) -> None:
        if section.name.startswith("blocks.1") and any(each is section for each in slow.seen) and not zerolith_rank():
            raise ArithmeticError("no such number")

    slow = Slow(monkeypatch, before)
    return slow


def test_any_other_failure_ends_all_ranks_too(tmp_path: Path, failing: Slow) -> None:
    def body() -> None:
        engine = start("forward", tmp_path)
        train_on(engine, DATA[:2])
        with pytest.raises(OffloadError, match="ArithmeticError in an update: no such number"):
            train_on(engine, DATA[2:3])
        with pytest.raises(UsageError, match="the last step failed half-way"):
            engine(DATA[1][:4])
        engine.destroy()

    run_ranks(2, body)


@pytest.mark.parametrize("read", [read_the_shards_of_a_state_dict, read_one_shard, read_the_optimizer])
def test_after_a_failure_nobody_is_given_weights_that_are_not_new(
    read: Callable[[Any, Path], Any], tmp_path: Path, failing: Slow
) -> None:
    engine = start("forward", tmp_path)
    train_on(engine, DATA[:2])
    if read is read_one_shard:
        engine.module.blocks[0].up.weight.local  # noqa: B018  # it was updated before the failure
    with pytest.raises(OffloadError, match=r"the last update of .* failed"):
        read(engine, tmp_path)
    engine.destroy()


def test_the_end_tells_of_a_failure(tmp_path: Path, failing: Slow, caplog: pytest.LogCaptureFixture) -> None:
    engine = start("forward", tmp_path)
    train_on(engine, DATA[:2])
    engine.destroy()
    assert "the last step failed" in caplog.text
    assert "no such number" in caplog.text


def test_loading_mends_a_failure(tmp_path: Path, failing: Slow) -> None:
    def body() -> Any:
        engine = start("forward", tmp_path)
        train_on(engine, DATA[:1])
        engine.save_checkpoint(tmp_path)
        train_on(engine, DATA[1:2])
        engine.load_checkpoint(tmp_path)
        failing.seen.clear()
        return train_on(engine, DATA[1:2]), read_the_shards_of_a_state_dict(engine, tmp_path)

    def undisturbed() -> Any:
        engine = start("none", tmp_path)
        return train_on(engine, DATA[:2])[2:], read_the_shards_of_a_state_dict(engine, tmp_path)

    assert_same(run_ranks(2, body), run_ranks(2, undisturbed))


def test_an_engine_that_is_dropped_on_the_updating_thread_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped, others = threading.Event(), {*threading.enumerate()}

    def before(section: Any) -> None:
        if section.name.startswith("blocks.2"):
            assert dropped.wait(PATIENCE_S)
            gc.collect()

    Slow(monkeypatch, before)
    engine = start("forward", tmp_path)
    model, sections = engine.module, engine._sharded.sections
    train_on(engine, DATA[:1])
    gone = weakref.ref(engine)
    gc.disable()
    del engine
    gc.enable()
    dropped.set()
    deadline = time.monotonic() + PATIENCE_S
    while {*threading.enumerate()} - others:
        assert time.monotonic() < deadline, "a thread waits for itself"
        time.sleep(0.01)
    assert gone() is None
    assert all(section.main is None and section.grads is None for section in sections), "it came to its end"
    assert all(torch.isfinite(param.local).all() for param in model.parameters())


def test_a_fork_in_the_midst_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = threading.Event()
    Slow(monkeypatch, lambda section: forked.wait(PATIENCE_S) and None)
    engine = start("forward", tmp_path)
    train_on(engine, DATA[:1])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.module.blocks[0].up.weight.local  # noqa: B018  # it is a property
        except UsageError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    forked.set()
    os.close(writing)
    assert b"forked while weights were being updated" in os.read(reading, 1000)
    os.close(reading)
    os.waitpid(child, 0)
    train_on(engine, DATA[1:2])
    engine.destroy()


def test_no_thread_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerolith.optim.behind.helpers", lambda *_: None)
    alone, plain = start("forward", tmp_path), start("none", tmp_path)
    assert_same(train_on(alone, DATA), train_on(plain, DATA))


def test_stages_whose_weights_are_seen_are_stepped_in_step_unless_told(tmp_path: Path, lagging: Slow) -> None:
    for stage in (1, 2):
        engine = start(None, tmp_path, stage=stage)
        train_on(engine, DATA[:2])
        assert not lagging.seen
        assert all(type(param) is nn.Parameter for param in engine.module.parameters())


def test_an_interrupt_while_waiting_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    results = []
    for overlap in ("forward", "none"):
        engine = start(overlap, tmp_path)
        losses = train_on(engine, DATA[:1])
        if overlap == "forward":
            with monkeypatch.context() as patch:
                patch.setattr("zerolith.optim.behind.Behind.settle_all", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    engine.save_checkpoint(tmp_path / "never")
        results.append((losses + train_on(engine, DATA[1:]), whole_weights(engine)))
        engine.destroy()
    assert_same(*results)
