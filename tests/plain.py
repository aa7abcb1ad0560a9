"""The training that tests compare: a small MLP in plain PyTorch on one process, and by engines on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import zerolith

# Torch imports its compiler with the first optimizer: here, once, rather than in every forked rank.
torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
zerolith.initialize  # noqa: B018  # and zerolith itself with the first use of its names

MICRO = 2  # samples in a micro-batch
STAGES = (0, 1, 2, 3)


class Batch(NamedTuple):
    """Inputs (n, 6) and targets (n, 3)."""

    x: Tensor
    y: Tensor


class Trained(NamedTuple):
    """What a training left."""

    weights: dict[str, Tensor]
    norms: list[float]
    applied: Sequence[bool] = ()  # was_step_applied after every step


def make_mlp(*, bias: bool = True, seed: int = 0, width: int = 24) -> nn.Sequential:
    """Every parameter gets a gradient that is not zero; one matrix spans several blocks of a layout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width, bias=bias),
        nn.Tanh(),
        nn.Linear(width, width, bias=bias),
        nn.Tanh(),
        nn.Linear(width, 3, bias=bias),
    )


def make_batches(steps: int, samples: int, *, seed: int = 1) -> list[Batch]:
    """One batch for each optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, samples, 6, generator=generator)
    y = torch.randn(steps, samples, 3, generator=generator)
    return [Batch(*pair) for pair in zip(x, y, strict=True)]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the batch, in the dtype of its targets."""
    return F.mse_loss(model(batch.x).to(batch.y.dtype), batch.y)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_micro_batches(batch: Batch) -> Iterator[Batch]:
    """This rank's: micro-batch g * ranks + r goes to rank r at accumulation step g."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    pieces = [Batch(*pair) for pair in zip(batch.x.split(MICRO), batch.y.split(MICRO), strict=True)]
    yield from pieces[rank :: world_size()]


def train_plain(
    model: nn.Module,
    batches: list[Batch],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    clip: float = 0.0,
) -> Trained:
    """Single-process PyTorch on whole batches."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(list(model.parameters()))
    norms = []
    for batch in batches:
        loss_of(model, batch).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf).item())
        optimizer.step()
        optimizer.zero_grad()
    return Trained(weights_of(model), norms, [True] * len(batches))


def config_for(stage: int, *, gas: int = 1, **overrides: Any) -> dict[str, Any]:
    """No clipping; at stage 3 every larger layer is a unit."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 64},
    }
    config["zero_optimization"].update(overrides.pop("zero_optimization", {}))
    return {**config, **overrides}


Habit = Callable[[Any, Any, list[Batch]], None]  # engine, returned optimizer, micro-batches of one optimizer step


def step_each(engine: Any, optimizer: Any, micro_batches: list[Batch]) -> None:
    """engine.step() after every micro-batch."""
    for batch in micro_batches:
        engine.backward(loss_of(engine, batch))
        engine.step()


def start(
    config: dict[str, Any],
    *,
    model: nn.Module | None = None,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    **kwargs: Any,
) -> Any:  # an Engine
    """An engine for a fresh copy of the MLP or of `model`; make_optimizer(parameters) becomes the client's."""
    model = copy.deepcopy(model) if model is not None else make_mlp()
    optimizer = make_optimizer(list(model.parameters())) if make_optimizer is not None else None
    return zerolith.initialize(model=model, optimizer=optimizer, config=config, **kwargs)[0]


def train_engine(engine: Any, batches: list[Batch], habit: Habit = step_each) -> Trained:
    """The same training by `engine`, which is destroyed in the end."""
    norms, applied = [], []
    for batch in batches:
        habit(engine, engine.optimizer, list(my_micro_batches(batch)))
        norms.append(engine.get_global_grad_norm())
        applied.append(engine.was_step_applied())
    weights = whole_weights(engine)
    engine.destroy()
    return Trained(weights, norms, applied)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter whole, whatever the stage. Collective."""
    for unit in engine._sharded.units:
        unit.gather()
    weights = weights_of(engine.module)
    engine._sharded.release_all()
    return weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def error_between(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of the same tensor."""
    assert got.keys() == expected.keys()
    return max(
        float((got[name].double() - expected[name].double()).abs().max() / expected[name].abs().max())
        for name in expected
    )


def assert_close(got: Trained, expected: Trained, *, rtol: float = 1e-5) -> None:
    assert error_between(got.weights, expected.weights) < rtol
    for mine, theirs in zip(got.norms, expected.norms, strict=True):
        assert abs(mine - theirs) <= rtol * theirs
    assert all(got.applied)


def assert_same_bits(got: Trained, expected: Trained) -> None:
    assert got.norms == expected.norms
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name
