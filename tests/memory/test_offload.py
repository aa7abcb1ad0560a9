"""What autograd saves goes to the host and is back before backward needs it; the bits are the same, nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memory.offload_setup import LAYERS, ROWS, WIDTH, Late, Log, Recorder, Setup, expected, same
from zerolith.memory.lane import AtOnce, Lane
from zerolith.memory.offload import Offload

POLICIES = ["full", "selective", "none"]
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
EVERY_COPIER = pytest.mark.parametrize("copier", [AtOnce, Late])


# --- when copies start ------------------------------------------------------------------------------


def test_copies_start_one_block_ahead_and_none_is_made_twice() -> None:
    setup = Setup("full")
    setup.loss().backward()
    size = ROWS * WIDTH * 4
    forward = [event for number in range(1, LAYERS + 1) for event in [("out", size), ("forward", number)]]
    backward = []
    for number in range(LAYERS, 0, -1):
        ahead = [("start", number - 1)] if number > 1 else []  # before this block computes
        backward += [*ahead, ("use", number), ("backward", number)]
    assert setup.log == forward + backward  # the last block's input was still there


@EVERY_POLICY
def test_of_a_block_all_is_on_its_way_before_the_next_one_in_backward_begins(policy: str) -> None:
    setup = Setup(policy)
    setup.loss().backward()
    starts = [number for event, number in setup.log if event == "start"]
    assert starts == sorted(starts, reverse=True)
    assert set(starts) == set(range(1, LAYERS))
    for number in range(1, LAYERS):
        first_use_after = setup.log.index(("use", number + 1))
        last_start = max(at for at, event in enumerate(setup.log) if event == ("start", number))
        assert last_start < first_use_after
    out = [nbytes for event, nbytes in setup.log if event == "out"]
    assert len(starts) == len(out) * (LAYERS - 1) // LAYERS, "each but the last block's, once"


def test_selective_keeps_products_on_the_host_and_does_not_compute_them_again() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    setup = Setup("selective")
    loss = setup.loss()
    with Products() as products:
        loss.backward()
    assert products.count == 0
    sizes = [nbytes for event, nbytes in setup.log if event == "out"]
    assert sizes == [ROWS * WIDTH * 4 * times for times in (1, 4, 1)] * LAYERS  # the input, and both products


# --- the same bits ----------------------------------------------------------------------------------


@EVERY_COPIER
@EVERY_POLICY
def test_gradients_are_the_same_bits_and_host_memory_is_made_once(policy: str, copier: type) -> None:
    setup = Setup(policy, copier, dropout=0.3)
    for seed in range(1, 5):
        setup.loss(seed).backward()
        assert same(setup.gradients(), expected(seed, dropout=0.3))
        assert setup.is_empty()
        if seed == 1:
            after_one = setup.lane.pool.num_allocated
    assert setup.lane.pool.num_allocated == after_one
    assert after_one == setup.count("out") // 4


@EVERY_COPIER
@EVERY_POLICY
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "last first"])
def test_two_forwards_may_stand_before_two_backwards(policy: str, copier: type, order: tuple[int, int]) -> None:
    setup = Setup(policy, copier, dropout=0.3)
    losses = [setup.loss(1), setup.loss(2)]
    out = setup.count("out")
    for which in order:
        losses[which].backward()
        assert same(setup.gradients(), expected(which + 1, dropout=0.3))
    assert setup.count("out") == out
    assert setup.count("start") <= out, "none twice"
    assert setup.is_empty()


@EVERY_COPIER
@EVERY_POLICY
def test_a_retained_graph_gives_its_gradients_again(policy: str, copier: type) -> None:
    setup = Setup(policy, copier, dropout=0.3)
    loss = setup.loss()
    for retained in (True, True, False):
        loss.backward(retain_graph=retained)
        assert same(setup.gradients(), expected(dropout=0.3))
        assert (setup.lane.pool.used_bytes > 0) is retained
    del loss
    assert setup.is_empty()


@pytest.mark.parametrize("policy", ["full", "none"])
def test_a_backward_of_a_backward(policy: str) -> None:
    found = []
    for setup in (Setup("all on the device"), Setup(policy)):
        gradients = torch.autograd.grad(setup.loss(), list(setup.model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        found.append(setup.gradients())
        del gradients
    assert same(*found)
    assert setup.is_empty()


def test_part_of_a_backward_leaves_the_rest_right() -> None:
    setup = Setup("full")
    reference = Setup("all on the device")
    found = []
    for each in (setup, reference):
        loss = each.loss()
        top = torch.autograd.grad(loss, list(each.model.layers[-2].parameters()), retain_graph=True)
        loss.backward()
        found.append([*top, *each.gradients()])
        del loss
    assert same(*found)
    assert setup.is_empty()


# --- nothing is left --------------------------------------------------------------------------------

FAILURES = [(policy, "forward") for policy in POLICIES] + [("full", "backward"), ("selective", "backward")]


@EVERY_COPIER
@pytest.mark.parametrize(("policy", "phase"), FAILURES)
def test_after_an_exception_nothing_is_left_and_the_next_step_is_right(policy: str, copier: type, phase: str) -> None:
    setup = Setup(policy, copier)
    setup.model.layers[1].failing = phase

    def fail() -> None:
        with pytest.raises(ArithmeticError):
            setup.loss().backward()

    fail()
    setup.gradients()
    setup.model.layers[1].failing = ""
    assert setup.after_an_exception_is_empty()
    setup.loss().backward()
    assert same(setup.gradients(), expected())
    assert setup.is_empty()


@EVERY_POLICY
def test_evaluation_copies_nothing_and_a_forward_without_backward_leaves_nothing(policy: str) -> None:
    setup = Setup(policy)
    with torch.no_grad():
        setup.loss()
    assert not setup.offload.lanes
    loss = setup.loss()
    assert setup.lane.pool.used_bytes > 0
    del loss
    assert setup.is_empty()
    assert setup.count("start") == 0


@EVERY_COPIER
def test_originals_leave_when_the_next_block_begins(copier: type) -> None:
    setup = Setup("full", copier)
    inputs: list[StorageWeakRef] = []
    for layer in setup.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = setup.loss()
    assert [memory.expired() for memory in inputs] == [True] * (LAYERS - 1) + [False]
    loss.backward()
    assert all(memory.expired() for memory in inputs)


@EVERY_POLICY
@EVERY_COPIER
@pytest.mark.parametrize("retained", [False, True])
def test_copies_are_on_the_device_for_two_blocks_at_most_and_for_none_afterwards(
    policy: str, copier: type, retained: bool
) -> None:
    setup = Setup(policy, copier)
    loss = setup.loss()
    for _ in range(1 + retained):
        loss.backward(retain_graph=retained)
        uses = [number for event, number in setup.log if event == "use"]
        for number, here in zip(uses, setup.lane.here, strict=True):
            assert set(here) <= {number, number - 1}
        assert not any(parcel.here is not None for parcel in setup.lane.parcels)
        assert not setup.lane._in_flight


def test_what_a_backward_brought_and_used_in_part_goes_when_it_ends() -> None:
    log: Log = []
    offload = Offload(min_bytes=0, make_lane=lambda device: Recorder(device, AtOnce(), log))
    h, first, second = torch.randn(4), torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    with offload.block().hooks():
        losses = [(h * first).sum(), (h * second).sum()]  # h is saved twice
    (lane,) = offload.lanes.values()
    for num_started in range(3):
        losses[0].backward(retain_graph=True)
        assert not any(parcel.here is not None for parcel in lane.parcels)
        assert [event for event, _ in log].count("start") == num_started


@pytest.mark.parametrize("back", [False, True])
def test_memory_stays_until_a_copy_that_nobody_wants_any_more_is_done(back: bool) -> None:
    lane = Lane(torch.device("cpu"), Late())
    parcel = lane.to_host(torch.randn(10))
    if back:
        lane.let_go(parcel)
        lane.start_back(parcel)
    memory = StorageWeakRef(parcel.here.untyped_storage())
    del parcel
    assert not memory.expired()
    lane.settle()
    assert memory.expired()
