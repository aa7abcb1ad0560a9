"""Checkpointed blocks train the same bits, keep what they should, and are not gathered once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import zerolith
from harness import run_ranks
from models import start_engine, zero_config
from zerolith.checkpointing import Options, checkpoint, checkpoint_blocks, configure, is_configured, reset
from zerolith.errors import ConfigError

WIDTH, TOKENS, LAYERS = 32, 4096, 4


class Mlp(nn.Module):
    """Autograd keeps its input (1), what enters gelu (4) and what leaves it (4): widths per token."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)


class Stack(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(dropout) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.out(x).square().mean()


def stack(dropout: float = 0.0) -> Stack:
    torch.manual_seed(0)
    return Stack(dropout)


POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"policy": "selective"},
    "full": {"policy": "full"},
    "full, every second": {"policy": "full", "every": 2},
    "full, by class": {"policy": "full", "classes": ["Mlp"]},
    "full, on the host": {"policy": "full", "cpu_checkpointing": True},
    "selective, on the host": {"policy": "selective", "cpu_checkpointing": True},
}


# --- the same numbers -------------------------------------------------------------------------------


def trained(stage: int, policy: str) -> tuple[list[float], int]:
    """Losses with dropout, and gathers of the last step."""
    config = zero_config(stage, activation_checkpointing=POLICIES[policy])
    engine = start_engine(stack(dropout=0.2), config)
    torch.manual_seed(7 + engine.global_rank)
    losses = []
    for _ in range(3):
        engine._sharded.comm.traffic.clear()
        loss = engine(torch.randn(8, WIDTH))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    gathers = engine._sharded.comm.traffic.calls["all_gather"]
    engine.destroy()
    return losses, gathers


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_policy_trains_the_same_bits_and_gathers_no_more(stage: int) -> None:
    def body() -> dict[str, tuple[list[float], int]]:
        return {policy: trained(stage, policy) for policy in POLICIES}

    for found in run_ranks(2, body):
        assert all(result == found["none"] for result in found.values()), found
        if stage == 3:  # root once, each block twice, but the last, which stays
            assert found["none"][1] == 1 + 2 * LAYERS - 1


# --- memory -----------------------------------------------------------------------------------------


def kept_bytes(options: Options | None) -> int:
    """What a forward leaves behind for backward."""
    model = stack()
    if options is not None:
        checkpoint_blocks(model, options=options)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(x)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert loss.requires_grad
    return sum(event.nbytes() for event in events)


FORMULAS: dict[str, tuple[Options | None, float]] = {  # widths per token and layer
    "none": (None, 1 + 4 + 4),
    "selective": (Options(selective=True), 1 + 4 + 1),  # the input and both products
    "full": (Options(), 1),
    "on the host": (Options(on_host=True), 1),  # on this device: a copy of it
}


@pytest.mark.parametrize("policy", FORMULAS)
def test_what_is_kept_is_what_the_formula_says(policy: str) -> None:
    options, widths = FORMULAS[policy]
    head = TOKENS * 4 * 2  # the output layer's result, for the square, and its input counts as a layer's own output
    expected = LAYERS * widths * TOKENS * WIDTH * 4 + head
    # The first layer's input was there before; the last one's output is kept by the head.
    assert kept_bytes(options) == pytest.approx(expected, rel=0.05)


def test_the_host_holds_a_copy_and_backward_the_same_gradients() -> None:
    saved: list[Tensor] = []
    original = torch.autograd.graph.save_on_cpu

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory=pin_memory)
            pack = self.pack_hook

            def watched(tensor: Tensor) -> Any:
                saved.append(tensor)
                return pack(tensor)

            self.pack_hook = watched

    gradients = []
    for options in (None, Options(on_host=True)):
        model = stack()
        if options is not None:
            checkpoint_blocks(model, options=options)
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.autograd.graph.save_on_cpu = Watched
        try:
            model(x).backward()
        finally:
            torch.autograd.graph.save_on_cpu = original
        gradients.append([param.grad for param in model.parameters()])
    filled = [tensor for tensor in saved if tensor.numel()]  # torch 2.11 saves an empty one beside each
    assert len(filled) == LAYERS, "each block's input, and nothing from inside"
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


# --- choosing, undoing, DeepSpeed's calls -----------------------------------------------------------


def chosen(model: nn.Module, **options: Any) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(each.module)] for each in checkpoint_blocks(model, options=Options(), **options)]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Sequential(nn.ModuleList(Mlp() for _ in range(2))) for _ in range(3))
        self.pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = Mlp()


def test_blocks_are_repeated_modules_with_parts_or_those_of_a_class() -> None:
    assert chosen(Nested()) == ["encoder.0", "encoder.1", "encoder.2"]
    assert chosen(Nested(), every=2) == ["encoder.0", "encoder.2"]
    every_mlp = [f"encoder.{outer}.0.{inner}" for outer in range(3) for inner in range(2)] + ["head"]
    assert chosen(Nested(), classes=["Mlp"]) == every_mlp
    assert chosen(Nested(), classes=[f"{Mlp.__module__}.Mlp"], every=3) == every_mlp[::3]
    shared = nn.ModuleList([Mlp()] * 2 + [Mlp()])
    assert chosen(shared) == ["0", "2"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"policy": "full", "classes": ["Mpl"]}, "no module is a Mpl; choose among.*Mlp"),
        ({"policy": "fulll"}, "activation_checkpointing.policy"),
        ({"policy": "full", "every": 0}, "activation_checkpointing.every"),
        ({"partition_activations": True}, "activations are not split over ranks"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start_engine(stack(), zero_config(0, activation_checkpointing=config))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no container of equal blocks; choose among Linear"):
        start_engine(nn.Linear(2, 2), zero_config(0, activation_checkpointing={"policy": "full"}))


def test_destroy_gives_blocks_their_own_forward_back() -> None:
    model = stack()
    config = zero_config(1, activation_checkpointing={"policy": "full"})
    engine = zerolith.initialize(model=model, config=config)[0]
    assert all("forward" in vars(layer) for layer in model.layers)
    engine.destroy()
    assert not any("forward" in vars(layer) for layer in model.layers)


def counted(count: list[int]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        count.append(1)
        return torch.tanh(x) * torch.sigmoid(x)

    return function


def test_checkpoint_is_deepspeeds_by_name_and_torchs_by_what_it_does() -> None:
    count: list[int] = []
    x = torch.randn(5, requires_grad=True)
    assert not is_configured()
    zerolith.checkpointing.checkpoint(counted(count), x).sum().backward()
    assert len(count) == 2, "computed again"
    expected = x.grad.clone()
    configure(None, deepspeed_config={"train_batch_size": 1, "activation_checkpointing": {"cpu_checkpointing": True}})
    try:
        assert is_configured()
        x.grad = None
        checkpoint(counted(count), x).sum().backward()
        assert torch.equal(x.grad, expected)
        with pytest.raises(ConfigError, match="partition_activations is not supported"):
            configure(partition_activations=True)
    finally:
        reset()
    assert not is_configured()


def test_a_config_decides_for_models_that_call_checkpoint_themselves() -> None:
    try:
        start_engine(stack(), zero_config(0, activation_checkpointing={"cpu_checkpointing": True}))
        assert is_configured()
    finally:
        reset()
