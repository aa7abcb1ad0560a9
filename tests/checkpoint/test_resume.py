"""A run that stops and resumes gives the same bits as one that does not, whatever the run is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt, token_batches, train_plain, whole_weights
from plain import STAGES, world_size

STEPS, STOP = 6, 3
MICRO = 4


class Awkward(nn.Module):
    """Dropout, statistics that differ by rank, a frozen layer, one that is not always used, and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 300)
        self.norm = nn.BatchNorm1d(300)
        self.frozen = nn.Linear(300, 30)
        self.frozen.requires_grad_(False)
        self.rare = nn.Linear(30, 30)
        self.last = nn.Linear(30, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.to(self.first.weight.dtype)
        x = nn.functional.dropout(self.norm(self.first(x)), 0.1, training=self.training)
        x = self.frozen(x)
        if self.calls % 4 == 0:
            x = x + self.rare(x)
        noise = random.random() + numpy.random.rand()
        return (self.last(x).float().mean() - noise) ** 2

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Sample(torch.utils.data.Dataset):
    """64 rows of numbers."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


def config_for(stage: int, **more: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 3000},
    }
    config["zero_optimization"].update(more.pop("zero_optimization", {}))
    return {**config, **more}


class Run:
    """An engine on Awkward, stepped once per micro-batch; `facts` is what must come out the same."""

    def __init__(self, config: dict[str, Any], *, seed: int) -> None:
        for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
            seeded(seed + world_size())  # type: ignore[operator]
        self.model = Awkward()
        self.engine, _, loader, _ = zerolith.initialize(model=self.model, config=config, training_data=Sample())
        self.batches: Iterator[Tensor] = iter(zerolith.RepeatingLoader(loader))
        self.facts: list[Any] = []

    def micro_step(self) -> None:
        loss = self.engine(next(self.batches))
        self.engine.backward(loss)
        self.engine.step()
        self.facts.append((loss.item(), self.engine.get_lr(), self.engine.loss_scale(), self.engine.global_steps))

    def end(self) -> list[Any]:
        weights = whole_weights(self.engine)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return [*self.facts[-5:], weights, buffers, self.model.calls, self.engine.global_samples, random.random()]


def uninterrupted(config: dict[str, Any], stop: int, total: int, folder: Path) -> list[Any]:
    run = Run(config, seed=1)
    for number in range(total):
        if number == stop:
            run.engine.save_checkpoint(folder)
        run.micro_step()
    return run.end()


def resumed(config: dict[str, Any], stop: int, total: int, folder: Path) -> list[Any]:
    run = Run(config, seed=2)
    run.micro_step()  # what was before a load leaves no trace
    path, _ = run.engine.load_checkpoint(folder)
    assert path is not None
    run.batches = iter(zerolith.RepeatingLoader(run.engine.training_dataloader))
    for _ in range(stop, total):
        run.micro_step()
    return run.end()


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}},
    "clipped": {"gradient_clipping": 0.1, "reproducible": True},
}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stop", [6, 5], ids=["between steps", "within an accumulation"])
def test_a_resumed_run_is_the_run_itself(stage: int, variant: str, stop: int, tmp_path: Path) -> None:
    config = config_for(stage, **VARIANTS[variant])
    for world in (1, 2) if stage == 1 else (2,):
        folder = tmp_path / str(world)
        whole = run_ranks(world, uninterrupted, config, stop, 11, folder)
        assert_same(run_ranks(world, resumed, config, stop, 11, folder), whole)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_no_sync_kept_are_resumed(stage: int, tmp_path: Path) -> None:
    def run(*, stops: bool) -> dict[str, Tensor]:
        data = token_batches(4, 8)
        config = config_for(stage)
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        rank = engine.global_rank
        engine.backward(engine(data[0][4 * rank : 4 * rank + 2]))
        engine.step()
        with engine.no_sync():
            engine.backward(engine(data[0][4 * rank + 2 : 4 * rank + 4]))
        if stops:
            engine.save_checkpoint(tmp_path)
            engine = zerolith.initialize(model=make_gpt(seed=5), config=config)[0]
            engine.load_checkpoint(tmp_path)
        engine.step()
        assert engine.global_steps == 1
        return whole_weights(engine)

    assert_same(run_ranks(2, lambda: run(stops=True)), run_ranks(2, lambda: run(stops=False)))


ELSEWHERE = [((1, 2, 2), (1, 1, 2)), ((3, 1, 4), (0, 2, 2)), ((2, 2, 2), (3, 1, 4)), ((0, 2, 2), (2, 2, 4))]


@pytest.mark.parametrize(("before", "after"), ELSEWHERE, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_unfinished_accumulation_goes_on_elsewhere(
    before: tuple[int, int, int], after: tuple[int, int, int], precision: str, tmp_path: Path
) -> None:
    """Half a step at one stage, number of ranks and of micro-batches, half at others: the mean over all samples."""
    data = token_batches(1, 16)[0]
    more = {"fp16": {"enabled": True, "initial_scale_power": 4}} if precision == "fp16" else {}

    def half(engine: Any, samples: Tensor) -> None:
        steps = engine.gradient_accumulation_steps() // 2
        for micro in samples.chunk(steps * world_size())[engine.global_rank :: world_size()]:
            engine.backward(engine(micro))
            engine.step()

    def begin(stage: int, gas: int) -> None:
        engine = zerolith.initialize(model=make_gpt(), config=sgd(stage, gas=gas, samples=16, **more))[0]
        half(engine, data[:8])
        engine.save_checkpoint(tmp_path)

    def finish(stage: int, gas: int) -> dict[str, Tensor]:
        engine = zerolith.initialize(model=make_gpt(seed=3), config=sgd(stage, gas=gas, samples=16))[0]
        engine.load_checkpoint(tmp_path)
        half(engine, data[8:])
        assert engine.global_steps == 1
        return whole_weights(engine)

    run_ranks(before[1], begin, before[0], before[2])
    weights = run_ranks(after[1], finish, after[0], after[2])[0]
    expected = train_plain(make_gpt(), data[None], lambda model: torch.optim.SGD(model.parameters(), lr=0.1), clip=1.0)
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if precision == "fp16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(weights, expected[1], **tolerance)


def test_a_part_of_a_step_that_is_no_whole_number_of_micro_batches_is_refused(tmp_path: Path) -> None:
    engine = zerolith.initialize(model=make_gpt(), config=sgd(1, gas=2))[0]
    engine.backward(engine(token_batches(1, 4)[0]))
    engine.step()
    engine.save_checkpoint(tmp_path)
    other = zerolith.initialize(model=make_gpt(), config=sgd(1, gas=1))[0]
    with pytest.raises(zerolith.errors.UsageError, match="after 1 of 2 micro-batches"):
        other.load_checkpoint(tmp_path)
    other.backward(other(token_batches(1, 4)[0]))  # nothing has changed
    other.step()


def sgd(stage: int, *, gas: int, samples: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": samples // gas // world_size(),
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True, foreach=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=1e-2),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-2), foreach=False),
    "two groups": lambda params: torch.optim.AdamW(
        [{"params": params[1::2], "weight_decay": 0.0}, {"params": params[::2], "lr": 3e-3}], lr=1e-2
    ),
}
NAMED = ["Lion", "Lamb", "Muon"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *NAMED])
@pytest.mark.parametrize("stages", [(0, 3), (3, 1)], ids=str)
def test_every_optimizer_resumes_at_another_stage(name: str, stages: tuple[int, int], tmp_path: Path) -> None:
    data = token_batches(6, 8)

    def make(stage: int, seed: int) -> Any:
        config = sgd(stage, gas=1)
        if name in NAMED:
            config["optimizer"] = {"type": name, "params": {"lr": 1e-3}}
            return zerolith.initialize(model=make_gpt(seed=seed), config=config)[0]
        del config["optimizer"]
        return zerolith.initialize(model=make_gpt(seed=seed), config=config, optimizer=OPTIMIZERS[name])[0]

    def train(engine: Any, first: int, last: int) -> None:
        for batch in data[first:last]:
            engine.backward(engine(batch.chunk(world_size())[engine.global_rank]))
            engine.step()

    def whole() -> dict[str, Tensor]:
        engine = make(stages[0], 0)
        train(engine, 0, 3)
        engine.save_checkpoint(tmp_path)
        train(engine, 3, 6)
        return whole_weights(engine)

    def second_half() -> dict[str, Tensor]:
        engine = make(stages[1], 1)
        train(engine, 5, 6)
        assert engine.load_checkpoint(tmp_path)[0] is not None
        train(engine, 3, 6)
        return whole_weights(engine)

    expected = run_ranks(2, whole)
    assert_same(run_ranks(2, second_half), expected)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 4), (4, 1), (3, 2)], ids=str)
def test_a_reproducible_run_goes_on_with_the_same_bits_on_other_ranks(worlds: tuple[int, int], tmp_path: Path) -> None:
    """24 samples a step in micro-batches of two, whatever the number of ranks."""
    data = token_batches(6, 24)
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "reproducible": True,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}},
    }

    def train(engine: Any, first: int, last: int) -> None:
        for batch in data[first:last]:
            for micro in batch.split(2)[engine.global_rank :: world_size()]:
                engine.backward(engine(micro))
                engine.step()

    def whole(*, saves: bool) -> dict[str, Tensor]:
        engine = zerolith.initialize(model=make_gpt(), config={**config, "zero_optimization": {"stage": 3}})[0]
        train(engine, 0, 3)
        if saves:
            engine.save_checkpoint(tmp_path)
        train(engine, 3, 6)
        return whole_weights(engine)

    def second_half() -> dict[str, Tensor]:
        engine = zerolith.initialize(model=make_gpt(seed=9), config={**config, "zero_optimization": {"stage": 1}})[0]
        engine.load_checkpoint(tmp_path)
        train(engine, 3, 6)
        return whole_weights(engine)

    expected = run_ranks(worlds[0], lambda: whole(saves=True))[0]
    assert_same(run_ranks(worlds[1], second_half)[0], expected)
