"""Checkpointed blocks train the same bits, keep what they should, and are not gathered once more."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import zerolith
from harness import run_ranks
from models import differing, sgd, start_engine, whole_weights, zero_config
from zerolith.checkpointing import (
    EXPENSIVE,
    Options,
    _run,
    checkpoint,
    checkpoint_blocks,
    configure,
    is_configured,
    reset,
)
from zerolith.errors import ConfigError
from zerolith.memory.offload import MIN_BYTES, Offload
from zerolith.memory.pool import HostPool

WIDTH, TOKENS, LAYERS = 32, 4096, 4
ROWS = MIN_BYTES // (4 * WIDTH)  # the input of a layer is just worth being moved


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


class Calling(Stack):
    """Calls zerolith.checkpointing itself, as models do that were written for DeepSpeed's."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, scale=0.5)
        return self.out(x).square().mean()


class Offloading(Stack):
    """Computes nothing again, and keeps all that its layers keep on the host."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.offload = Offload()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            with self.offload.block().hooks():
                x = layer(x, scale=0.5)
        return self.out(x).square().mean()

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloading:
        copied = Offloading(self.layers[0].dropout)
        copied.load_state_dict(self.state_dict())
        return copied


def stack(dropout: float = 0.0, kind: type[Stack] = Stack) -> Stack:
    torch.manual_seed(0)
    return kind(dropout)


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
        loss = engine(torch.randn(ROWS, WIDTH))
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


ON_HOST: dict[str, tuple[type[Stack], dict[str, Any], int]] = {  # model, config, tensors on the host per layer
    "full": (Stack, {"policy": "full", "cpu_checkpointing": True}, 1),
    "selective": (Stack, {"policy": "selective", "cpu_checkpointing": True}, 3),  # with both products
    "called by the model": (Calling, {"cpu_checkpointing": True}, 1),
    "without checkpoints": (Offloading, {}, 3),  # its input, and what enters and leaves gelu
}


def trained_on_host(
    stage: int, kind: type[Stack], policy: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses and weights of three steps of two micro-batches each, and how many tensors the last step moved."""
    moved = []
    take = HostPool.take

    def counted_take(pool: HostPool, nbytes: int) -> Tensor:
        moved.append(nbytes)
        return take(pool, nbytes)

    config = zero_config(stage, gradient_accumulation_steps=2, activation_checkpointing=policy)
    engine = start_engine(stack(0.0, kind), config, sgd)
    torch.manual_seed(7 + engine.global_rank)
    losses = []
    HostPool.take = counted_take  # type: ignore[method-assign]
    try:
        for _ in range(3):
            moved.clear()
            for _ in range(2):
                loss = engine(torch.randn(ROWS, WIDTH))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
    finally:
        HostPool.take = take  # type: ignore[method-assign]
        reset()
    weights = whole_weights(engine)
    engine.destroy()
    return losses, weights, len(moved)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_kept_on_the_host_comes_back_as_the_same_bits(stage: int, world: int) -> None:
    def body() -> None:
        losses, weights, moved = trained_on_host(stage, Stack, {})
        assert moved == 0
        for name, (kind, policy, per_layer) in ON_HOST.items():
            found, found_weights, moved = trained_on_host(stage, kind, policy)
            assert found == losses, name
            assert not differing(found_weights, weights), name
            assert moved == 2 * LAYERS * per_layer, name

    run_ranks(world, body)


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
    # Here the host is the device, too: it holds copies of the same, and what the last layer keeps has not left.
    "on the host": (Options(offload=Offload()), 1 + 1 / LAYERS),
    "selective, on the host": (Options(selective=True, offload=Offload()), (1 + 4 + 1) * (1 + 1 / LAYERS)),
}


@pytest.mark.parametrize("policy", FORMULAS)
def test_what_is_kept_is_what_the_formula_says(policy: str) -> None:
    options, widths = FORMULAS[policy]
    head = TOKENS * 4 * 2  # the output layer's result, for the square, and its input counts as a layer's own output
    expected = LAYERS * widths * TOKENS * WIDTH * 4 + head
    # The first layer's input was there before; the last one's output is kept by the head.
    assert kept_bytes(options) == pytest.approx(expected, rel=0.05)


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


def test_configure_acts_on_every_thread() -> None:
    """Autograd computes again on threads of its own, and must meet what forward met."""
    configure(checkpoint_in_cpu=True)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(is_configured).result()
    finally:
        reset()


def compiled_losses(policy: dict[str, Any], compiled: bool) -> list[float]:
    torch._dynamo.reset()
    engine = start_engine(stack(), zero_config(0, activation_checkpointing=policy))
    if compiled:
        engine.compile(backend="eager")
    torch.manual_seed(3)
    losses = []
    for _ in range(2):
        loss = engine(torch.randn(ROWS, WIDTH))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@pytest.mark.parametrize("policy", ["full, on the host", "selective, on the host"])
def test_compiling_changes_nothing_of_what_is_kept_on_the_host(policy: str) -> None:
    def body() -> tuple[list[float], list[float]]:  # not here: the compiler leaves much behind in a process
        return compiled_losses({}, False), compiled_losses(POLICIES[policy], True)

    ((plain, compiled),) = run_ranks(1, body)
    assert plain == compiled


def test_a_parameter_may_be_an_argument() -> None:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    x = torch.randn(ROWS, WIDTH)
    F.gelu(x @ weight.t()).sum().backward()
    expected, weight.grad = weight.grad, None
    configure(checkpoint_in_cpu=True)
    try:
        checkpoint(lambda x, w, w_t: F.gelu(x @ w_t + 0 * w.sum()), x, weight, weight.t()).sum().backward()
    finally:
        reset()
    assert torch.equal(weight.grad, expected)


class Debugged(nn.Module):
    """Its forward has parameters of its own that torch's checkpoint has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, *, debug: bool = False, preserve_rng_state: float = 1.0, function: int = 0) -> Tensor:
        return self.inner(x) * (2.0 if debug else 1.0) * preserve_rng_state + function


@pytest.mark.parametrize("offload", [False, True])
def test_keywords_are_the_blocks_own(offload: bool) -> None:
    model = nn.ModuleList([Debugged(), Debugged()])
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    expected = model[0](x, debug=True, preserve_rng_state=3.0, function=1)
    undo = checkpoint_blocks(model, options=Options(offload=Offload() if offload else None))
    torchs_own = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    for got in (
        model[0](x, debug=True, preserve_rng_state=3.0, function=1),
        checkpoint(partial(model[0].forward, preserve_rng_state=3.0), x, debug=True, function=1, **torchs_own),
    ):
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in (got, expected)))
    for forward in undo:
        forward.remove()


# --- random numbers ---------------------------------------------------------------------------------


@torch.library.custom_op("zerolith_tests::noisy_attention", mutates_args=())
def noisy_attention(query: Tensor, other: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Like CUDA's fused attention: with dropout it draws from torch's generator, out of autograd's sight."""
    return query * other * (torch.rand_like(query) >= dropout_p if dropout_p else 1.0)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    query, output = ctx.saved_tensors
    return grad * output, grad * query * (output != 0), None


noisy_attention.register_autograd(_backward, setup_context=_keep_for_backward)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("policy", ["selective", "selective, on the host", "full"])
def test_attention_that_drops_out_is_computed_again_with_the_numbers_of_forward(
    monkeypatch: pytest.MonkeyPatch, policy: str, dropout: float
) -> None:
    kept = torch.ops.zerolith_tests.noisy_attention.default
    monkeypatch.setattr("zerolith.checkpointing.EXPENSIVE", [*EXPENSIVE, kept])
    options = Options(selective="selective" in policy, offload=Offload() if policy.endswith("host") else None)

    def block(x: Tensor) -> Tensor:
        return F.dropout(torch.sin(noisy_attention(x, torch.cos(x), dropout)), 0.5).square()

    def gradient(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(3)
        x = torch.linspace(0.1, 2.0, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
        run(block, x).sum().backward()
        assert x.grad is not None
        return x.grad

    plain = gradient(lambda function, x: function(x))
    assert torch.equal(gradient(partial(_run, options)), plain)


def test_the_random_state_of_a_tensor_that_is_passed_by_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps those of the devices that it sees among the arguments."""
    seen: list[Tensor] = []
    infer = torch.utils.checkpoint._infer_device_type

    def watch(*args: Any) -> str:
        seen.extend(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return infer(*args)

    monkeypatch.setattr("torch.utils.checkpoint._infer_device_type", watch)
    x, mask = torch.ones(2, requires_grad=True), torch.ones(2)
    checkpoint(lambda *, states, masks: states * masks[0], states=x, masks=[mask]).sum().backward()
    assert any(each is x for each in seen)
    assert any(each is mask for each in seen)
    assert x.grad is not None
