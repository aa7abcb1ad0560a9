"""Which tensors go to the host, how they come back, changes in place, and checkpoints in checkpoints."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from memory.offload_setup import LAYERS, ROWS, WIDTH, Setup, expected, same
from zerolith.checkpointing import Options, checkpoint, checkpoint_blocks, configure, reset
from zerolith.errors import UsageError
from zerolith.memory.lane import Lane
from zerolith.memory.offload import MIN_BYTES, Offload

# --- what goes, what stays --------------------------------------------------------------------------


def test_a_tensor_that_every_block_saves_goes_once() -> None:
    mask = (torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 3 > 0).float()
    setup = Setup("full")
    setup.loss(1, mask).backward()
    assert setup.count("out") == LAYERS + 1
    assert setup.count("start") <= LAYERS + 1, "and comes back once"
    reference = Setup("all on the device")
    reference.loss(1, mask).backward()
    assert same(setup.gradients(), reference.gradients())
    assert setup.is_empty()


def pack(tensor: Tensor, *, min_bytes: int = 0) -> tuple[Any, Lane | None]:
    offload = Offload(min_bytes=min_bytes)
    packed = offload.block().pack(tensor)
    return packed, next(iter(offload.lanes.values()), None)


WEIGHT = nn.Parameter(torch.randn(300, 300))
LEAF = torch.randn(300, 300, requires_grad=True)
MOVED: dict[str, tuple[Tensor, int]] = {  # and the bytes on the host
    "plain": (torch.randn(20, 30), 2400),
    "of one element": (torch.tensor(3.0), 4),
    "transposed": (torch.randn(20, 30).t(), 2400),
    "permuted": (torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2), 480),
    "a slice": (torch.randn(20, 30)[:, 3:7], 320),
    "expanded": (torch.randn(20, 1, 30).expand(2, 20, 7, 30), 2400),
    "bf16": (torch.randn(20, 30).bfloat16(), 1200),
    "bool": (torch.randn(20, 30) > 0, 600),
    "complex": (torch.randn(20, 30, dtype=torch.complex64).conj(), 4800),
    "a result": (LEAF.exp(), 360_000),
}
STAYS: dict[str, Tensor] = {
    "a parameter": WEIGHT,
    "a view of a parameter": WEIGHT.t(),
    "a frozen parameter": nn.Parameter(torch.randn(300, 300), requires_grad=False),
    "a leaf that wants a gradient": LEAF,
    "a view of such a leaf": LEAF[3:],
    "what is small": torch.randn(MIN_BYTES // 4 - 1),
    "what repeats little": torch.randn(1).expand(300, 300),
    "what has no memory": torch.empty(300, 300, device="meta"),
    "what is sparse": torch.eye(300).to_sparse(),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_goes_comes_back_in_its_shape_and_order(name: str) -> None:
    tensor, nbytes = MOVED[name]
    packed, lane = pack(tensor)
    assert lane is not None
    assert lane.pool.used_bytes == nbytes
    lane.let_go(packed.parcel)
    for back in (packed.get(), packed.get()):  # the second time it is copied again
        assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        assert torch.equal(back, tensor)
        if name != "a slice":
            assert back.stride() == tensor.stride()
        assert not back.requires_grad


@pytest.mark.parametrize("name", STAYS)
def test_what_would_free_nothing_or_little_stays(name: str) -> None:
    packed, lane = pack(STAYS[name], min_bytes=MIN_BYTES)
    assert lane is None
    if STAYS[name].layout is torch.strided and not STAYS[name].is_meta:
        assert packed.get().data_ptr() == STAYS[name].data_ptr()


def test_a_result_that_stays_does_not_hold_its_own_graph() -> None:
    offload = Offload(min_bytes=MIN_BYTES)
    with offload.block().hooks():
        x = torch.randn(4, requires_grad=True)
        y = (2 * x).exp()
    memory = StorageWeakRef(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert memory.expired(), "without the help of the garbage collector"
    finally:
        gc.enable()


# --- changes in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("min_bytes", [0, MIN_BYTES], ids=["moved", "kept"])
def test_a_change_before_a_tensor_left_is_an_error(min_bytes: int) -> None:
    offload = Offload(min_bytes=min_bytes)
    h = 2 * torch.randn(4, requires_grad=True)
    with offload.block().hooks():
        y = h.exp().sum() + (h * h).sum()
    h.detach().add_(1)
    with pytest.raises(UsageError, match=r"shape \(4,\) .* modified in place"):
        y.backward()


def test_a_change_after_it_left_is_none() -> None:
    x = torch.randn(4, requires_grad=True)
    offload = Offload(min_bytes=0)
    h = 2 * x
    with offload.block().hooks():
        y = (h * h).sum()
    with offload.block().hooks():
        z = (3 * y).exp().log()
    h.detach().add_(1)
    z.backward()
    assert torch.allclose(x.grad, 24 * x.detach())


def test_the_same_memory_with_new_values_is_another_tensor() -> None:
    x = torch.randn(4, requires_grad=True)
    offload = Offload(min_bytes=0)
    h = 2 * x
    with offload.block().hooks():
        y = (h * h).sum()
    with offload.block().hooks():
        z = (3 * y).exp().log()
    h.detach().add_(1)
    with offload.block().hooks():
        z = z + (h * h).sum()
    z.backward()
    assert torch.allclose(x.grad, 24 * x.detach() + 4 * h.detach())


# --- checkpoints in checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["ours", "torch's"])
@pytest.mark.parametrize("inner", ["ours", "torch's"])
def test_checkpoints_in_checkpoints(outer: str, inner: str) -> None:
    kinds = {"ours": checkpoint, "torch's": lambda *args: torch_checkpoint(*args, use_reentrant=False)}
    torch.manual_seed(0)
    a, b = nn.Linear(128, 256), nn.Linear(256, 128)

    def nested(x: Tensor, wrap: bool) -> Tensor:
        function = lambda h: F.dropout(b(F.gelu(a(h))), 0.2)  # noqa: E731
        return x + (kinds[inner](function, 2 * x) if wrap else function(2 * x))

    found = []
    configure(checkpoint_in_cpu=True)
    try:
        for wrap in (False, True):
            torch.manual_seed(1)
            x = torch.randn(128, 128)
            for _ in range(3):
                x = kinds[outer](nested, x, True) if wrap else nested(x, False)
            x.square().sum().backward()
            found.append([param.grad for param in (*a.parameters(), *b.parameters())])
            a.zero_grad()
            b.zero_grad()
    finally:
        reset()
    assert same(*found)


def test_an_inner_checkpoint_leaves_its_input_to_the_outer_one() -> None:
    setup = Setup("full")
    for layer in setup.model.layers:
        layer.up.forward = lambda h, up=layer.up: checkpoint(F.linear, h, up.weight, up.bias)
    configure(checkpoint_in_cpu=True)
    try:
        setup.loss().backward()
    finally:
        reset()
    assert setup.count("out") == LAYERS
    assert same(setup.gradients(), expected())


# --- copies of the model ----------------------------------------------------------------------------


def test_a_copy_of_a_model_and_a_pickled_one_keep_on_the_host_too() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3)))
    offload = Offload()
    checkpoint_blocks(model, options=Options(offload=offload))
    x = torch.randn(256, 128)
    loss = model(x).sum()  # something is on its way
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(x).sum().backward()
        loss = model(x).sum()
        loss.backward()
        pairs = zip(other.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(one.grad, another.grad) for one, another in pairs)
        model.zero_grad()
