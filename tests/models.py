"""Small models and the plain PyTorch training that everything is compared with."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._dynamo  # torch.optim would load it in every forked rank anew, for seconds
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import zerolith
from zerolith.zero import safe_get_full_fp32_param

zerolith.initialize  # noqa: B018  # loaded now, for the same reason
gc.collect()
gc.freeze()  # collections in forked ranks need not go through, and thereby copy, what the parent has loaded

PRECISIONS: dict[str, dict[str, Any]] = {  # config sections, by name
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 2}},  # so that it moves
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "two groups": lambda params: torch.optim.AdamW(
        [{"params": params[1::2], "weight_decay": 0.0}, {"params": params[::2], "lr": 3e-3}], lr=1e-2, fused=True
    ),
}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT with a tied head; returns the loss."""

    def __init__(self, vocab: int = 64, width: int = 32, layers: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_gpt(seed: int = 0, **kwargs: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(**kwargs)


def token_batches(steps: int, batch: int, *, time: int = 17, vocab: int = 64, seed: int = 1) -> Tensor:
    """(steps, batch, time) random tokens with some structure to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, vocab, (steps, batch, 1), generator=generator)
    return (start + torch.arange(time) * 3 + torch.randint(0, 3, (steps, batch, time), generator=generator)) % vocab


def train_plain(
    model: nn.Module,
    data: Tensor,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    clip: float = 0.0,
) -> tuple[list[float], dict[str, Tensor]]:
    """Single-process PyTorch on whole batches; returns losses and final parameters."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    losses = []
    for batch in data:
        loss = model(batch)
        losses.append(loss.item())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: param.detach().clone() for name, param in model.named_parameters()}


def zero_config(stage: int, **overrides: Any) -> dict[str, Any]:
    """A small config in which every block is a unit."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
    }
    zero = overrides.pop("zero_optimization", {})
    config["zero_optimization"].update(zero)
    config.update(overrides)
    return config


class Trained(NamedTuple):
    """What a training by an engine gave on this rank."""

    losses: list[float]
    norms: list[float]  # of the mean gradient, before clipping
    weights: dict[str, Tensor]


def train_zero(
    model: nn.Module,
    data: Tensor,
    config: dict[str, Any],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Trained:
    """Train a copy of `model` on global batches, one optimizer step each. Collective."""
    engine = start_engine(model, config, make_optimizer)
    losses, norms = [], []
    for batch in data:
        losses += train_on(engine, batch[None])
        norms.append(engine.get_global_grad_norm())
    weights = whole_weights(engine)
    engine.destroy()
    return Trained(losses, norms, weights)


def train_on(engine: Any, data: Tensor) -> list[float]:
    """Train on global batches; returns this rank's loss of each micro-batch. Collective."""
    losses = []
    for batch in data:
        for piece in my_pieces(batch, engine):
            loss = engine(piece)
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
    return losses


def start_engine(
    model: nn.Module,
    config: dict[str, Any],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Any:  # an Engine; typed Any since tests also look inside
    """An engine for a copy of `model`."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model) if make_optimizer is not None else None
    return zerolith.initialize(model=model, optimizer=optimizer, config=config)[0]


def my_pieces(batch: Tensor, engine: Any) -> Iterator[Tensor]:
    """This rank's micro-batches of a global batch: number g * ranks + r is rank r's at accumulation step g."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    yield from batch.split(engine.train_micro_batch_size_per_gpu())[rank::world]


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter whole, whatever the stage; it is at rest again afterwards. Collective."""
    weights = {}
    for unit in engine._sharded.units:
        unit.gather()
        for section in unit.sections:
            weights |= {member.name: member.param.detach().clone() for member in section.members}
        if unit.uses == 0:
            unit.release()
    return weights


def whole_masters(engine: Any) -> Tensor:
    """Every trained parameter's master, flattened, side by side. Collective."""
    return torch.cat([safe_get_full_fp32_param(param).flatten() for param in engine.module.parameters()])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum and weight decay: a step that should not have been shows."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def error_between(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of the same tensor. Neither may hold NaN."""
    assert got.keys() == expected.keys(), f"{sorted(got)} against {sorted(expected)}"
    assert all(torch.isfinite(value).all() for value in [*got.values(), *expected.values()])
    return max(
        float((got[name].double() - value.double()).abs().max() / value.abs().max().clamp(min=1e-8))
        for name, value in expected.items()
        if value.numel()
    )


def assert_same(one: Any, other: Any) -> None:
    """The same bits, in containers of any depth."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits."""
    assert got.keys() == expected.keys(), f"{sorted(got)} against {sorted(expected)}"
    return [name for name, value in expected.items() if not torch.equal(got[name], value)]
