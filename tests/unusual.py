"""Models that use their modules and parameters in every way that plain PyTorch allows.

Each is called as model(x, step, rank) with x of shape (3, 8), and returns a loss. What a rank may do differently from
the others is its own use of parameters, never which modules it calls.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from models import start_engine, whole_weights, zero_config

WIDTH = 8


class Layer(nn.Module):
    """A residual layer with a parameter of each kind of shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.outer(torch.tanh(self.inner(x)))


class Chain(nn.Module):
    """Layers one after the other: what most cases change in one point."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        return self.head(self.hidden(x, step, rank)).square().mean()


class UsedTwice(Chain):
    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        return self.layers[0](self.layers[2](self.layers[0](x)))


class NeverUsed(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.layers[1].spare = nn.Parameter(torch.ones(5))


class UsedInSomeSteps(Chain):
    """Every other step a module is skipped, and so is a parameter of one that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bonus = nn.ParameterList([torch.full((WIDTH,), 0.1), torch.full((WIDTH,), 0.2)])

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = self.layers[0](x) + self.bonus[step % 2]
        return self.layers[2](x if step % 2 else self.layers[1](x))


class OnOneRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.extra = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor, *, use: bool) -> Tensor:
        return self.lin(x) * self.extra if use else self.lin(x)


class UsedOnOneRank(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.ModuleList(OnOneRank() for _ in range(3))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for number, (layer, odd) in enumerate(zip(self.layers, self.odd, strict=True)):
            x = odd(layer(x), use=rank == number % 2)
        return x


class ModuleOnOneRank(Chain):
    """Only right where forward does not communicate."""

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = self.layers[0](x)
        return self.layers[2](x if rank else self.layers[1](x))


class AnotherOrder(Chain):
    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for shift in range(3):
            x = self.layers[(step + shift) % 3](x)
        return x


class AnotherNumberOfTimes(Chain):
    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for _ in range(1 + step % 3):
            x = self.layers[step % 2](x)
        return self.layers[2](x)


class Declared(Chain):
    """Modules in another order than that of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Layer()

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        return super().hidden(self.first(x), step, rank)


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].inner.weight = self.layers[0].inner.weight
        self.layers[1].outer = self.layers[0].outer


class OddShapes(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.turned = nn.Parameter(torch.randn(4, WIDTH).t() / 4)
        self.doubles = nn.Parameter(torch.zeros(0, dtype=torch.float64))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = super().hidden(x, step, rank) * self.scalar + self.empty.sum() + self.doubles.sum().float()
        return x + (x @ self.turned) @ self.turned.t()


class External(Chain):
    """Parameters that other modules hold: as attributes, by a method, as a module's output, as a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Holder()
        self.borrower = Borrower([self.layers[0].inner])

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = F.linear(x, self.layers[1].outer.weight, self.layers[2].inner.bias)
        x = x + self.table()[:1] + self.table(rows=2).sum(0)
        x = self.borrower(self.layers[0](x))
        return super().hidden(x, step, rank) + self.layers[1].inner.forward(x)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH) / 4)

    def forward(self, rows: int | None = None) -> Tensor:
        return self.weight if rows is None else self.weight[:rows]


class Borrower(nn.Module):
    def __init__(self, others: list[nn.Module]) -> None:
        super().__init__()
        self.others = others  # in a plain list: not its children
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(F.linear(self.lin(x), self.others[0].weight))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        hidden, (last, _) = self.rnn(x[None])
        return self.head(hidden).square().mean() + last.mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = x[None]
        for layer in self.layers:
            x = layer(x)
        mixed, weights = self.cross(x, x.roll(1, 1), x)
        return (mixed * mixed).mean() + weights[..., 0].mean()


class EncoderDecoder(Chain):
    """The encoder's output goes into every block of the decoder, and into some that do not look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cross() for _ in range(4))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        memory = super().hidden(x, step, rank)
        for number, block in enumerate(self.blocks):
            x = block(x, memory=memory, look=number != 2)
        return x


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, memory: Tensor, look: bool) -> Tensor:
        return x + torch.tanh(self.query(x) * self.key(memory)) if look else x + self.query(x) + self.key(x)


@dataclass
class Output:
    value: Tensor
    extras: dict[str, Any]


class Slots:
    __slots__ = ("items",)

    def __init__(self, items: deque[Tensor]) -> None:
        self.items = items


class Structured(nn.Module):
    """Takes keywords; returns what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lin, self.side = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, *, inputs: dict[str, Tensor]) -> Any:
        value, side = torch.tanh(self.lin(inputs["x"])), self.side(inputs["x"])
        return {
            "tuple": lambda: (value, None, [side], "text", 3),
            "dict": lambda: {"value": value, "nested": {"side": side}},
            "dataclass": lambda: Output(value=value, extras={"side": side}),
            "object": lambda: types.SimpleNamespace(value=value, side=types.SimpleNamespace(side=side)),
            "slots": lambda: Slots(deque([value, side])),
        }[self.kind]()


class Outputs(Chain):
    def __init__(self) -> None:
        super().__init__()
        kinds = ("tuple", "dict", "dataclass", "object", "slots")
        self.parts = nn.ModuleDict({kind: Structured(kind) for kind in kinds})

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        value, _, (side,), *_ = self.parts["tuple"](inputs={"x": x})
        out = self.parts["dict"](inputs={"x": value + side})
        data = self.parts["dataclass"](inputs={"x": out["value"] + out["nested"]["side"]})
        value, side = self.parts["slots"](inputs={"x": data.value + data.extras["side"]}).items
        thing = self.parts["object"](inputs={"x": value + side})
        # Now one output alone goes on to the loss.
        return self.parts["dataclass"](inputs={"x": thing.value}).extras["side"]


class ReturnsDataclass(Chain):
    def forward(self, x: Tensor, step: int, rank: int) -> Any:
        return Output(value=super().forward(x, step, rank), extras={})


class NoGradient(Chain):
    """Modules whose outputs need no gradient, or are detached; one that returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.target = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)
        self.same = nn.ModuleList([nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity())])

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(x)
        x = self.layers[0](x)
        chosen = self.router(x).argmax(-1, keepdim=True)
        x = self.same[1](self.same[0](self.layers[1](x))) * (1 + chosen)
        return self.layers[2](x) - wanted


class SideLoss(Chain):
    """Modules leave a part of the loss behind as an attribute."""

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        self.aside = 0.0
        for layer in self.layers:
            x = layer(x)
            self.aside = self.aside + x.square().mean()
        return x

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        return super().forward(x, step, rank) + 0.1 * self.aside


class InPlace(Chain):
    """Outputs and inputs of modules are written to."""

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = self.layers[0](x)
        x.mul_(1.1)
        x = self.layers[1](x + 0).add_(x)
        y = self.layers[2](x)
        y[0] = y[0] * 2 + x[1]
        return F.relu_(y)


class Heads(nn.Module):
    """Returns a view of what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.lin(x))).unflatten(-1, (4, 2)).transpose(1, 2)


class ViewInPlace(Chain):
    """The view that a module has returned is written to, as position embeddings often are added."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Heads(), Heads()])
        self.position = nn.Parameter(torch.linspace(-1, 1, 8).view(2, 4))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = self.heads[0](super().hidden(x, step, rank))
        x += self.position
        return self.heads[1](x.flatten(1)).flatten(1)


class Router(nn.Module):
    """Leaves a loss of its own as an attribute, made after its output, by other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.tanh(self.inner(x)))
        self.balance = torch.tanh(self.gate(x)).square().mean()
        return y


class Routed(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Sequential(Router()) for _ in range(3))

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        for router in self.routers:
            x = router(x)
        return super().forward(x, step, rank) + 0.1 * sum(router[0].balance for router in self.routers)


class Norms(Chain):
    """Buffers: batch norm, and spectral-like parametrized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
        self.normed = weight_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.normed(x + self.shift.to(x.dtype))


class Convolutions(nn.Module):
    """Weights and gradients that do not lie row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        image = x[:2].view(1, 2, 4, 2).contiguous(memory_format=torch.channels_last)
        return self.convs(image).square().mean()


class Adapted(nn.Module):
    """A frozen base and trained adapters in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


class LoRA(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted() for _ in range(3))
        self.head.bias.requires_grad_(False)


class FrozenForAWhile(Chain):
    """A layer is frozen from the start and trained from step 2 on; another the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.set_frozen(0)

    def set_frozen(self, step: int) -> None:
        self.layers[0].requires_grad_(step >= 2)
        self.layers[2].inner.weight.requires_grad_(step < 2)


class Checkpointed(Chain):
    """`how`: outside the layers, inside them, around several, nested, or around the method that holds all."""

    def __init__(self, how: str, *, reentrant: bool) -> None:
        super().__init__(layers=4)
        self.how = how
        self.reentrant = reentrant
        if how == "inside":
            self.layers = nn.ModuleList(CheckpointedLayer(self._checkpoint) for _ in range(4))

    def _checkpoint(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        return checkpoint(run, *args, use_reentrant=self.reentrant)

    def _pair(self, number: int, x: Tensor) -> Tensor:
        return self.layers[number + 1](self.layers[number](x))

    def _nested_pair(self, number: int, x: Tensor) -> Tensor:
        return self._checkpoint(self.layers[number + 1], self.layers[number](x))

    def _all(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.layers[0].inner.weight)

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = x.clone().requires_grad_()  # reentrant checkpoints want an input that needs a gradient
        if self.how == "all":
            return self._checkpoint(self._all, x)
        if self.how in ("pairs", "nested"):
            run = self._pair if self.how == "pairs" else self._nested_pair
            return self._checkpoint(run, 2, self._checkpoint(run, 0, x))
        for layer in self.layers:
            x = self._checkpoint(layer, x) if self.how == "outside" else layer(x)
        return x


class CheckpointedLayer(Layer):
    def __init__(self, run_checkpoint: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run_checkpoint = run_checkpoint
        self.normed = weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) + self.run_checkpoint(super().forward, x)


class SharedAndCheckpointed(Chain):
    """One layer runs in several recomputed parts."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = x.clone().requires_grad_()
        for layer in (self.layers[0], self.layers[1], self.layers[0], self.layers[2]):
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.layers[1](x)


class Compiled(Chain):
    def __init__(self, backend: str) -> None:
        super().__init__()
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)


class GradientPenalty(Chain):
    """The loss holds a gradient with respect to the input."""

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = x.clone().requires_grad_()
        loss = super().forward(x, step, rank)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()


class PenaltyFirst(Chain):
    """That gradient is taken first; then the layers compute again, with and without a graph."""

    def forward(self, x: Tensor, step: int, rank: int) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.head(self.hidden(x, step, rank)).mean(), x, create_graph=True)
        with torch.no_grad():
            self.hidden(x, step, rank)
        return slope.square().sum() + super().forward(x.detach(), step, rank)


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": Chain,
    "used twice": UsedTwice,
    "never used": NeverUsed,
    "used in some steps": UsedInSomeSteps,
    "used on one rank": UsedOnOneRank,
    "another order each step": AnotherOrder,
    "another number of calls each step": AnotherNumberOfTimes,
    "declared in another order": Declared,
    "tied across units": Tied,
    "odd shapes": OddShapes,
    "external parameters": External,
    "LSTM": Recurrent,
    "attention": Attention,
    "encoder and decoder": EncoderDecoder,
    "structured outputs": Outputs,
    "returns a dataclass": ReturnsDataclass,
    "outputs without gradient": NoGradient,
    "side loss": SideLoss,
    "in place": InPlace,
    "a view in place": ViewInPlace,
    "losses left aside": Routed,
    "norms": Norms,
    "convolutions": Convolutions,
    "LoRA": LoRA,
    "frozen for a while": FrozenForAWhile,
    "gradient penalty": GradientPenalty,
    "gradient penalty first": PenaltyFirst,
    **{
        f"{'reentrant' if reentrant else 'non-reentrant'} checkpoint: {how}": lambda how=how, reentrant=reentrant: (
            Checkpointed(how, reentrant=reentrant)
        )
        for reentrant in (False, True)
        for how in ("outside", "inside", "pairs", "nested", "all")
    },
    "shared, non-reentrant checkpoints": lambda: SharedAndCheckpointed(reentrant=False),
    "shared, reentrant checkpoints": lambda: SharedAndCheckpointed(reentrant=True),
}


# --- training them ------------------------------------------------------------------------------

STEPS = 5
TINY = 20  # elements from which on a module is a unit
Optimize = Callable[[nn.Module], torch.optim.Optimizer]


def config_for(stage: int, **overrides: Any) -> dict[str, Any]:
    zero = {"stage3_param_persistence_threshold": TINY, **overrides.pop("zero_optimization", {})}
    return zero_config(stage, train_micro_batch_size_per_gpu=3, zero_optimization=zero, **overrides)


def inputs(world: int) -> Tensor:
    """(step, rank, sample, feature)"""
    return torch.randn(STEPS, world, 3, 8, generator=torch.Generator().manual_seed(7))


def loss_of(output: Any) -> Tensor:
    return output.value if isinstance(output, Output) else output


def train_sharded(
    model: nn.Module, make_optimizer: Optimize, data: Tensor, config: dict[str, Any]
) -> dict[str, Tensor]:
    engine = start_engine(model, config, make_optimizer)
    for step, by_rank in enumerate(data):
        if hasattr(engine.module, "set_frozen"):
            engine.module.set_frozen(step)
        loss = loss_of(engine(by_rank[engine.global_rank], step, engine.global_rank))
        engine.backward(loss)
        engine.step()
    weights = whole_weights(engine)
    engine.destroy()
    return weights
