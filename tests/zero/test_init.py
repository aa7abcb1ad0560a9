"""zero.Init: models that never exist whole are the same models."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerolith
import zerolith.zero.init as init_module
from harness import run_ranks
from models import GPT, make_gpt, token_batches, train_plain, zero_config
from zerolith.comm import Comm, default_comm
from zerolith.errors import ShardedAccessError
from zerolith.parameter import ShardedParameter


class ParentInitialises(nn.Module):
    """Does to its children's weights all that constructors do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4)  # zeroes its own child's bias
        self.rest = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        nn.init.constant_(self.first.weight, 7.0)
        with torch.no_grad():
            self.rest[0].weight[3].zero_()  # a view of a weight that is sharded by now
            self.rest[1].weight.add_(self.rest[0].weight)
        self.apply(self._initialise)
        self.rest[5].bias.data[2:4] = 5.0
        self.out = nn.Linear(64, 64)
        self.out.weight = self.first.weight  # tied

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module is not self.first:
            module.weight.data.normal_(0.0, 0.02)
            module.weight.data[0].fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = torch.tanh(layer(x))
        return self.out(x).square().mean()


def build(factory: Callable[[], nn.Module], seed: int, *, sharded: bool) -> nn.Module:
    torch.manual_seed(seed)
    with zerolith.zero.Init(enabled=sharded):
        return factory()


def check_same_weights(factory: Callable[[], nn.Module], open_bytes: int) -> None:
    init_module.OPEN_BYTES = open_bytes
    plain = dict(build(factory, 0, sharded=False).named_parameters())
    # Only rank 0's random numbers count, as everywhere.
    model = build(factory, default_comm().rank, sharded=True)
    names = dict(model.named_parameters())
    assert names.keys() == plain.keys()
    assert all(isinstance(param, ShardedParameter) for param in names.values())
    with zerolith.zero.GatheredParameters(model.parameters()):
        for name, param in model.named_parameters():
            assert type(param) is nn.Parameter
            assert torch.equal(param, plain[name]), name
    assert all(isinstance(param, ShardedParameter) for param in model.parameters())


@pytest.mark.parametrize("open_bytes", [0, 20_000, 1 << 30])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_constructors_find_what_they_wrote_and_keep_what_they_write(world: int, open_bytes: int) -> None:
    run_ranks(world, check_same_weights, ParentInitialises, open_bytes)


def train(stage: int, sharded: bool) -> tuple[list[float], dict[str, Tensor]]:
    init_module.OPEN_BYTES = 10_000
    model = build(GPT, 0, sharded=sharded)
    config = zero_config(stage, optimizer={"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}})
    engine, *_ = zerolith.initialize(model=model, config=config)
    losses = []
    for batch in token_batches(3, 8):
        loss = engine(batch.chunk(engine.world_size)[engine.global_rank])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    params = {name: zerolith.zero.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    return losses, params


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_is_the_same_with_and_without_init(stage: int) -> None:
    [(losses, params), _] = run_ranks(2, train, stage, True)
    [(plain_losses, plain_params), _] = run_ranks(2, train, stage, False)
    assert losses == plain_losses
    assert all(torch.equal(params[name], value) for name, value in plain_params.items())
    _, oracle = train_plain(
        make_gpt(), token_batches(3, 8), lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
    )
    for name, value in oracle.items():
        torch.testing.assert_close(params[name], value, rtol=1e-4, atol=1e-6)


def look_at_new_things_only() -> None:
    """To look at all that was imported takes a second each time."""
    gc.collect()
    gc.freeze()


def live_bytes() -> int:
    """Bytes of the distinct storages that Python objects hold."""
    time.sleep(0.1)  # gloo's threads let go of what they have sent a moment after the collective is done
    storages = {}
    for item in gc.get_objects():
        # Not isinstance: it asks a dead weak proxy, of which torch's compiler leaves some, what it is.
        is_tensor = issubclass(type(item), Tensor) and not issubclass(type(item), ShardedParameter)
        if is_tensor and item.layout is torch.strided:  # sparse ones have no storage
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Deep(nn.Module):
    """Sixteen equal layers; notes how much is alive whenever one is done."""

    peak = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(16):
            self.layers.append(nn.Linear(256, 256))
            Deep.peak = max(Deep.peak, live_bytes())


def measure_peak() -> tuple[int, int, int]:
    look_at_new_things_only()
    init_module.OPEN_BYTES = 256 * 256 * 4
    before = live_bytes()
    model = build(Deep, 0, sharded=True)
    whole = sum(param.numel() * 4 for param in model.parameters())
    return Deep.peak - before, live_bytes() - before, whole


def test_a_model_four_times_larger_than_a_rank_may_hold_is_built() -> None:
    for peak, after, whole in run_ranks(4, measure_peak):
        layer = whole // 16
        assert after <= 1.01 * whole / 4 + 16 * 1024  # its shards, and their padding
        assert peak <= whole / 4 + 3 * layer


def use_too_early(how: str) -> None:
    model = build(lambda: nn.Linear(8, 8), 0, sharded=True)
    uses = {
        "compute": lambda: model(torch.zeros(1, 8)),
        "functional": lambda: F.linear(torch.zeros(1, 8), model.weight),
        "data": lambda: model.weight.data.fill_(1.0),
    }
    with pytest.raises(ShardedAccessError, match=r"Linear\.weight"):
        uses[how]()


@pytest.mark.parametrize("how", ["compute", "functional", "data"])
def test_a_parameter_that_is_sharded_but_in_no_engine_refuses(how: str) -> None:
    run_ranks(2, use_too_early, how)


def convert_existing() -> None:
    model = make_gpt()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    zerolith.zero.Init(module=model)
    assert model.head.weight is model.embed.weight
    with zerolith.zero.GatheredParameters(list(model.parameters())):
        for name, param in model.named_parameters():
            assert torch.equal(param, expected[name])


def test_an_existing_module_can_be_sharded_at_once() -> None:
    run_ranks(2, convert_existing)


def keep_dtype() -> None:
    with zerolith.zero.Init(dtype=torch.bfloat16):
        model = nn.Linear(4, 4)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.shape == (4, 4)
    assert model.weight.requires_grad


def test_dtype_is_that_of_the_new_parameters() -> None:
    run_ranks(2, keep_dtype)


class WithIntegers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(600), requires_grad=False)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.table.sum()).mean()


def build_with_integers() -> None:
    model = build(lambda: nn.Sequential(WithIntegers()), 0, sharded=True)
    with zerolith.zero.GatheredParameters(list(model.parameters())):
        assert torch.equal(model[0].table, torch.arange(600))


def test_integer_parameters_are_sharded_too() -> None:
    run_ranks(2, build_with_integers)


def kept_after_initialize(stage: int) -> tuple[int, int]:
    look_at_new_things_only()
    init_module.OPEN_BYTES = 256 * 256 * 4
    model = build(Deep, 0, sharded=True)
    kept = list(model.parameters())  # as an optimizer does that was built on them
    optimizer = torch.optim.SGD(kept, lr=0.1)
    numel = sum(param.numel() for param in kept)
    gc.collect()
    before = live_bytes()
    engine = zerolith.initialize(model=model, optimizer=optimizer, config=zero_config(stage))[0]
    gc.collect()
    held = numel * 4 // (2 if stage == 3 else 1)
    growth = live_bytes() - before + numel * 4 // 2  # the shards that construction left were there before
    assert engine.zero_optimization_stage() == stage
    assert all(param.local.numel() == param.owned.numel for param in kept)
    return growth, held


@pytest.mark.parametrize("stage", [1, 3])
def test_the_shards_of_construction_go_when_the_engine_has_its_own(stage: int) -> None:
    for growth, held in run_ranks(2, kept_after_initialize, stage):
        assert growth <= 1.05 * held + 64 * 1024


def peak_of_initialize(sharded: bool) -> tuple[int, int]:
    """Bytes that initialize adds at its peak to what is kept, and those of one layer."""
    look_at_new_things_only()
    model = build(Deep, 0, sharded=sharded)
    before, seen = live_bytes(), []
    broadcast = Comm.broadcast

    def measured(comm: Comm, tensor: Tensor, *, source: int = 0, name: str) -> None:
        seen.append(live_bytes() - before)
        broadcast(comm, tensor, source=source, name=name)

    Comm.broadcast = measured  # type: ignore[method-assign]
    zerolith.initialize(model=model, config=zero_config(3))
    return max(seen), 256 * 257 * 4


@pytest.mark.parametrize("sharded", [False, True])
def test_initialize_never_holds_the_model_whole_beside_what_it_was_given(sharded: bool) -> None:
    for peak, layer in run_ranks(4, peak_of_initialize, sharded):
        assert peak <= 16 * layer / 4 + 3 * layer


class Nested(nn.Module):
    """Enters a context of its own, as libraries do whose models are built inside of another's."""

    def __init__(self, dtype: torch.dtype | None, *, enabled: bool = True) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        with zerolith.zero.Init(dtype=dtype, enabled=enabled):
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            zerolith.zero.Init(module=self.inner, enabled=enabled)
        self.after = nn.Linear(8, 8)


def build_nested(dtype: torch.dtype | None) -> None:
    whole = build(lambda: Nested(None, enabled=False), 0, sharded=False)
    plain = dict(whole.named_parameters()) if dtype is None else {}
    model = build(lambda: Nested(dtype), default_comm().rank, sharded=True)
    assert [param.dtype for param in model.inner.parameters()] == [dtype or torch.float32] * 4
    assert {param.dtype for param in [*model.before.parameters(), *model.after.parameters()]} == {torch.float32}
    with zerolith.zero.GatheredParameters(model.parameters()):
        for name, param in plain.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), param, rtol=0, atol=0)
    assert not init_module._active


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_contexts_within_each_other_are_one(dtype: torch.dtype | None) -> None:
    run_ranks(2, build_nested, dtype)


def fail_inside() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no model"), zerolith.zero.Init(), zerolith.zero.Init():
            nn.Linear(4, 4)
            raise RuntimeError("no model")
    assert not init_module._active
    assert not isinstance(nn.Linear(4, 4).weight, ShardedParameter)


def test_an_exception_ends_all_contexts() -> None:
    run_ranks(2, fail_inside)


def build_from_a_slice() -> None:
    def make() -> nn.Module:
        holder = nn.Module()
        holder.part = nn.Parameter(torch.arange(240.0).view(40, 6)[:, :3] + default_comm().rank)
        return holder

    model = build(make, 0, sharded=True)
    with zerolith.zero.GatheredParameters(model.part):
        assert torch.equal(model.part, torch.arange(240.0).view(40, 6)[:, :3])


def test_a_parameter_with_gaps_in_its_memory_is_sharded_right() -> None:
    run_ranks(2, build_from_a_slice)
