"""Gradients on their way to masters in host memory, and weights on their way back: the same bits, whenever copied."""

from __future__ import annotations

import itertools
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from memory.offload_setup import Late
from models import assert_same, make_gpt, my_pieces, sgd, train_on, whole_masters, whole_weights
from overlapping import DATA, config_for, start
from unusual import CASES, config_for as unusual_config_for, inputs, train_sharded
from zerolith.departures import MOST
from zerolith.errors import OffloadError
from zerolith.memory.pool import HostPool
from zerolith.section import Section
from zerolith.zero import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}


class LateForAll(Late):
    """For copies that several threads start and wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = RLock()
        self.num_started = 0

    def start(self, target: Tensor, source: Tensor) -> object:
        with self.lock:
            self.num_started += 1
            target.fill_(77)  # whoever reads it too early is found out
            return super().start(target, source)

    def wait(self, copy: object) -> None:
        with self.lock:
            super().wait(copy)

    finish = wait


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> list[LateForAll]:
    """As if host memory were far from the device; the copiers of the engines that are made."""
    copiers: list[LateForAll] = []

    def host_copier(device: torch.device) -> LateForAll:
        copiers.append(LateForAll())
        return copiers[-1]

    monkeypatch.setattr("zerolith.placement.host_copier", host_copier)
    return copiers


def near(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("zerolith.placement.host_copier", lambda device: None)


def both(far: list[LateForAll], world: int, body: Any, *, copies: bool = True) -> None:
    """Asserts that `body` gives the same with host memory that is far, and with the device's own."""

    def is_far() -> Any:
        result = body()
        assert bool(far[0].num_started) == copies
        return result

    def is_near() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            near(patch)
            return body()

    assert_same(run_ranks(world, is_far), run_ranks(world, is_near))


CASES_OF_TRAINING = [
    (stage, device, overlap, precision, clip)
    for stage in (1, 2, 3)
    for device, overlap, precision, clip in [
        ("cpu", "none", "bf16", 0.5), ("cpu", "forward", "bf16", 0.5), ("cpu", "backward", "bf16", 0.0),
        ("cpu", "backward", "bf16", 0.75), ("cpu", "backward", "fp16", 0.75), ("cpu", "forward", "fp16", 0.5),
        ("nvme", "none", "fp16", 0.5), ("nvme", "forward", "bf16", 0.5), ("nvme", "backward", "bf16", 0.0),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("stage", "device", "overlap", "precision", "clip"), CASES_OF_TRAINING)
def test_the_way_to_the_host_changes_no_bit(
    stage: int, device: str, overlap: str, precision: str, clip: float, tmp_path: Path, far: list[LateForAll]
) -> None:
    def body() -> Any:
        more = {**(BF16 if precision == "bf16" else FP16), "gradient_clipping": clip}
        engine = start(overlap, tmp_path, device=device, stage=stage, **more)
        losses = train_on(engine, DATA)
        norm = engine.get_global_grad_norm()
        result = losses, norm, whole_weights(engine), whole_masters(engine)
        engine.destroy()
        return result

    for world in (1, 2) if device == "cpu" else (2,):
        both(far, world, body)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_those_that_stay_go_nowhere(ratio: float, tmp_path: Path, far: list[LateForAll]) -> None:
    def body() -> Any:
        config = config_for("forward", tmp_path, **BF16)
        config["zero_optimization"]["offload_optimizer"]["ratio"] = ratio
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        return train_on(engine, DATA), whole_weights(engine)

    both(far, 2, body, copies=ratio > 0)


@pytest.mark.parametrize("name", CASES)
def test_unusual_modules(name: str, far: list[LateForAll]) -> None:
    def body() -> dict[str, Tensor]:
        torch.manual_seed(0)
        offload = {"offload_optimizer": {"device": "cpu", "overlap": "forward"}}
        config = unusual_config_for(2, zero_optimization=offload, bf16={"enabled": True})
        make = sgd if "frozen" in name else None  # else AdamW in one pass, which writes new weights itself
        return train_sharded(CASES[name]().bfloat16(), make, inputs(2).bfloat16(), config)

    both(far, 2, body)


class Alternating(nn.Module):
    """Parameters of one size, of which the second is used in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, step: int) -> Tensor:
        for number, part in enumerate(self.parts):
            x = x + torch.tanh(part(x)) if number % 2 == 0 or step % 2 == 0 else x
        return x.float().square().mean()


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_which_some_get_no_gradient(stage: int, overlap: str, tmp_path: Path, far: list[LateForAll]) -> None:
    def body() -> Any:
        torch.manual_seed(0)
        config = config_for(overlap, tmp_path, stage=stage, **BF16)
        config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
        config["zero_optimization"]["reduce_bucket_size"] = 16 * 17
        engine = zerolith.initialize(model=Alternating(), config=config)[0]
        for step in range(5):
            engine.backward(engine(torch.ones(2, 16, dtype=torch.bfloat16) * (1 + step), step))
            engine.step()
        weights = whole_weights(engine)
        masters = [safe_get_full_fp32_param(param).bfloat16() for param in engine.module.parameters()]
        assert_same(masters, list(weights.values()))
        return weights

    both(far, 2, body)


@pytest.mark.parametrize("way", ["far", "near"])
@pytest.mark.parametrize(("stage", "overlap"), [(2, "backward"), (1, "none"), (3, "none"), (3, "forward")])
def test_what_a_step_has_left_is_not_published_over_a_checkpoint(
    stage: int, overlap: str, way: str, tmp_path: Path, far: list[LateForAll], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was given up, or failed while it published."""
    if way == "near":
        near(monkeypatch)
    engine = start(overlap, tmp_path, stage=stage, **BF16)
    train_on(engine, DATA[:2])
    engine.save_checkpoint(tmp_path / "saved")
    saved = whole_weights(engine), whole_masters(engine)
    up_to_step(engine, DATA[3])
    if overlap != "backward":
        calls = itertools.count()
        real = Section.start_publish

        def failing(section: Section) -> Any:
            if next(calls) == 2:
                raise OffloadError("in the midst")
            return real(section)

        with monkeypatch.context() as patch:
            patch.setattr(Section, "start_publish", failing)
            with pytest.raises(OffloadError):
                engine.step()
                engine._catch_up()
    engine.load_checkpoint(tmp_path / "saved")
    assert_same((whole_weights(engine), whole_masters(engine)), saved)
    if way == "far":
        assert not engine._partitioned._far.departures._pool.used_bytes
    engine.destroy()


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
def test_without_page_locked_memory_training_goes_on(
    overlap: str,
    tmp_path: Path,
    far: list[LateForAll],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body() -> Any:
        engine = start(overlap, tmp_path, **BF16)
        return train_on(engine, DATA), whole_weights(engine)

    expected = body()
    real, calls = HostPool.take, itertools.count()

    def take(pool: HostPool, nbytes: int) -> Tensor:
        if next(calls) % 3:
            raise OffloadError("no room")
        return real(pool, nbytes)

    monkeypatch.setattr(HostPool, "take", take)
    assert_same(body(), expected)
    assert "slower way" in caplog.text


def up_to_step(engine: Any, batch: Tensor) -> None:
    for piece in my_pieces(batch, engine):
        engine.backward(engine(piece))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_leave_in_the_backward_that_completes_them(stage: int, tmp_path: Path, far: list[LateForAll]) -> None:
    def body() -> None:
        engine = start("none", tmp_path, stage=stage, **BF16)
        gradients = engine._sharded.gradients
        first, second = my_pieces(DATA[0], engine)
        engine.backward(engine(first))
        assert not far[0].num_started, "another micro-batch's are added on the device"
        engine.backward(engine(second))
        assert far[0].num_started == len(gradients)
        held = [own for own in gradients if own.held()]
        assert len(held) <= MOST < len(gradients)
        engine.step()
        assert not any(own.held() for own in gradients)

    run_ranks(2, body)


def test_host_memory_is_used_again_and_given_back(tmp_path: Path, far: list[LateForAll]) -> None:
    for overlap in ("none", "forward", "backward"):
        engine = start(overlap, tmp_path, **BF16)
        train_on(engine, DATA[:2])
        pool = engine._partitioned._far.departures._pool
        allocated = pool.num_allocated
        for _ in range(3):
            train_on(engine, DATA)
        engine._catch_up()
        # Of a thread that updates beside the training it is a matter of time how many are in use at once.
        shards = [own.section.layout.numel * (4 + 2) for own in engine._sharded.gradients]  # a gradient and weights
        assert pool.num_allocated == allocated or overlap != "none"
        assert pool.idle_bytes <= pool.most_kept * sum(shards)
        assert not pool.used_bytes
        engine.destroy()


def read(engine: Any) -> Any:
    return [safe_get_full_grad(param) for param in engine.module.parameters()]


def write(engine: Any) -> None:
    for param in engine.module.parameters():
        grad = safe_get_full_grad(param)
        safe_set_full_grad(param, grad * 3)


def go_on(engine: Any) -> None:
    """Another backward, which nobody has announced."""
    engine.set_gradient_accumulation_boundary(True)
    up_to_step(engine, DATA[1])


def drop(engine: Any) -> None:
    engine.zero_grad()
    up_to_step(engine, DATA[2])


def start_over(engine: Any) -> None:
    engine.reset()
    up_to_step(engine, DATA[2])


@pytest.mark.parametrize("act", [read, write, go_on, drop, start_over])
@pytest.mark.parametrize("overlap", ["none", "forward"])
def test_what_is_done_between_backward_and_step(act: Any, overlap: str, tmp_path: Path, far: list[LateForAll]) -> None:
    def body() -> Any:
        engine = start(overlap, tmp_path, gradient_clipping=0.5, **BF16)
        train_on(engine, DATA[:1])
        up_to_step(engine, DATA[1])
        seen = act(engine)
        engine.step()
        norm = engine.get_global_grad_norm()
        engine.set_gradient_accumulation_boundary(True)
        return seen, norm, whole_weights(engine), whole_masters(engine)

    both(far, 2, body)


def test_a_checkpoint_before_the_step_has_the_gradients(tmp_path: Path, far: list[LateForAll]) -> None:
    def body() -> Any:
        engine = start("forward", tmp_path, **BF16)
        train_on(engine, DATA[:1])
        up_to_step(engine, DATA[1])
        engine.save_checkpoint(tmp_path / "saved")
        engine.destroy()
        engine = start("forward", tmp_path, **BF16)
        engine.load_checkpoint(tmp_path / "saved")
        engine.step()
        return train_on(engine, DATA[2:]), whole_weights(engine)

    both(far, 2, body)


@pytest.mark.parametrize("factor", [float("nan"), 1e25])
def test_gradients_that_are_too_large(factor: float, tmp_path: Path, far: list[LateForAll]) -> None:
    """Not finite: the step is skipped. Finite, with squares that are not: the norm is right all the same."""

    def body() -> Any:
        engine = start("none", tmp_path, gradient_clipping=0.5, **BF16)
        train_on(engine, DATA[:1])
        for piece in my_pieces(DATA[1], engine):
            engine.backward(engine(piece) * factor)
        engine.step()
        norm = engine.get_global_grad_norm()
        return engine.skipped_steps, norm, train_on(engine, DATA[2:]), whole_weights(engine)

    both(far, 2, body)
