"""Collecting, accumulating and reducing: order, memory, and what counts as used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from models import differing, error_between, sgd, start_engine, train_plain, whole_weights, zero_config
from unusual import CASES, WIDTH, Chain
from zerolith.comm import default_comm
from zerolith.gradients import Gradients, Reducer
from zerolith.member import Member
from zerolith.partitioning import Partitioning
from zerolith.precision import Precision
from zerolith.section import Plan, Section

STAGES = (0, 1, 2, 3)
UNITS = {"stage3_param_persistence_threshold": 20}


def engine_for(stage: int, model: nn.Module, **overrides: Any) -> Any:
    zero = {**UNITS, **overrides.pop("zero_optimization", {})}
    return start_engine(model, zero_config(stage, zero_optimization=zero, **overrides), sgd)


# --- one section, by hand ---------------------------------------------------------------------------


def make_gradients(
    stage: int, *, half: bool = False, shapes: tuple[tuple[int, ...], ...] = ((3, 4), (5,))
) -> Gradients:
    comm = default_comm()
    precision = Precision(compute=torch.bfloat16 if half else None)
    plan = Plan(partitioning=Partitioning.from_stage(stage), precision=precision, comm=comm)
    members = [
        Member(name=str(number), param=nn.Parameter(torch.ones(shape)), group=0) for number, shape in enumerate(shapes)
    ]
    section = Section(members, plan, name="section", touch=lambda *_: torch.zeros(()))
    return Gradients(section, plan.partitioning, precision, comm)


def test_gradients_take_no_memory_before_the_first_comes() -> None:
    own = make_gradients(2)
    assert own.section.grads is not None
    assert not own.section.grads.is_allocated
    assert own.term is None
    assert own.sum.data.abs().sum() == 0.0, "who asks early finds zeros"


def reduced(own: Gradients) -> list[Tensor]:
    own.start_reduce(completes=True).wait()
    own.start_finish().wait()
    return [own.sum.slot(index) for index in range(len(own.section.members))]


def test_gradients_of_any_strides_and_sparse_ones_are_taken() -> None:
    own = make_gradients(0, shapes=((3, 4), (4, 2)))
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 2), (4, 2), check_invariants=True)
    own.collect(0, torch.arange(12.0).view(4, 3).t(), reducing=True)
    own.collect(1, rows, reducing=True)
    own.collect(1, rows, reducing=True)  # as when it comes twice in one backward
    dense, sparse = reduced(own)
    assert torch.equal(dense, torch.arange(12.0).view(4, 3).t())
    assert torch.equal(sparse, 2 * rows.to_dense())


def test_a_parameter_without_a_gradient_sums_to_zero_whatever_the_memory_held() -> None:
    own = make_gradients(0, half=True)
    for value in (7.0, 1.0):
        own.comm.pool.give(torch.full((own.section.layout.numel,), 99.0, dtype=torch.bfloat16))
        own.collect(0, torch.full((3, 4), value), reducing=True)
        assert own.used == [True, False]
        first, second = reduced(own)
        assert (first.unique().tolist(), second.unique().tolist()) == ([value], [0.0])
        assert float(own.sum.data.sum()) == 12 * value, "padding is not zero"
        own.reset()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_fills_its_section_is_sent_as_it_is_and_never_written(stage: int) -> None:
    own = make_gradients(stage, shapes=((16, 32),))
    first, second = torch.full((16, 32), 2.0), torch.full((16, 32), 3.0)
    own.collect(0, first, reducing=True)
    assert own.term is not None
    assert shares(own.term.buffer.data, first)
    assert reduced(own)[0].unique().tolist() == [2.0]
    assert not shares(own.sum.data, first)
    own.reset()
    own.collect(0, first, reducing=True)
    own.collect(0, second, reducing=True)  # a second one in the same backward is added to a copy
    assert reduced(own)[0].unique().tolist() == [5.0]
    assert (first.unique().tolist(), second.unique().tolist()) == ([2.0], [3.0])


ODD: dict[str, Callable[[Tensor], Tensor]] = {  # made in the test: others look at every tensor of the process
    "transposed": lambda ones: ones.view(32, 16).t(),
    "expanded": lambda ones: ones[:1, :1].expand(16, 32),
    "sparse": lambda ones: ones.to_sparse(),
    "fp64": lambda ones: ones.double(),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_gradient_that_does_not_lie_as_its_section_does_is_copied(odd: str) -> None:
    own = make_gradients(2, shapes=((16, 32),))
    own.collect(0, ODD[odd](torch.ones(16, 32)), reducing=True)
    assert own.term is not None
    assert own.term.pooled
    assert reduced(own)[0].unique().tolist() == [1.0]


def test_sums_take_no_memory_from_a_step_to_the_next_backward() -> None:
    own = make_gradients(2)
    own.collect(0, torch.ones(3, 4), reducing=True)
    reduced(own)
    assert own.section.grads is not None
    assert own.section.grads.is_allocated
    own.reset()
    assert not own.section.grads.is_allocated


def shares(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_term_that_rests_and_the_sum_lie_in_one_memory(stage: int) -> None:
    own = make_gradients(stage)
    own.collect(0, torch.full((3, 4), 2.0), reducing=False)
    term = own.term
    assert term is not None
    own.collect(0, torch.full((3, 4), 3.0), reducing=True)
    assert reduced(own)[0].unique().tolist() == [5.0]
    assert shares(own.sum.data, term.buffer.data)
    assert own.section.grads is not None
    assert own.section.grads.is_allocated == (stage == 0)
    own.reset()
    own.collect(0, torch.full((3, 4), 1.0), reducing=True)
    assert reduced(own)[0].unique().tolist() == [1.0]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_terms_are_added_to_what_was_reduced_before(stage: int) -> None:
    """As without a step in between, or after no_sync."""
    own = make_gradients(stage)
    for reducing in (True, False, True):
        own.collect(0, torch.ones(3, 4), reducing=reducing)
        if reducing:
            own.start_reduce(completes=True).wait()
    assert reduced(own)[0].unique().tolist() == [3.0]


def accumulate_small_numbers(half: bool) -> float:
    """1 + 256 * 2**-9 is 1.5; in bf16 alone nothing would be added."""
    own = make_gradients(1, half=half)
    own.collect(0, torch.ones(3, 4), reducing=False)
    for _ in range(256):
        own.collect(0, torch.full((3, 4), 2.0**-9, dtype=torch.bfloat16), reducing=False)
    return reduced(own)[0].unique().item()


@pytest.mark.parametrize("half", [False, True])
def test_low_precision_gradients_are_accumulated_in_fp32(half: bool) -> None:
    assert accumulate_small_numbers(half) == 1.5


def test_hooks_do_not_keep_a_dropped_reducer_alive() -> None:
    own = make_gradients(1)
    param = own.section.members[0].param
    reducer = Reducer([own], own.comm, overlap=True)
    param.sum().backward()
    assert reducer.gradients[0].term is not None
    own.reset()
    del reducer
    param.sum().backward()
    assert own.term is None


# --- order ------------------------------------------------------------------------------------------


def order_of_collectives(case: str, stage: int) -> list[str]:
    """What was sent in the third backward."""
    torch.manual_seed(0)
    engine = engine_for(stage, CASES[case]())
    comm = engine._sharded.comm
    for step in range(3):
        before = comm.journal.count
        engine.backward(engine(torch.ones(3, WIDTH), step, engine.global_rank))
        sent = comm.journal.latest()[before - comm.journal.count :]
        engine.step()
    return [entry.split(" ", 1)[1] for entry in sent]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["declared in another order", "used on one rank", "never used", "encoder and decoder"])
def test_ranks_send_the_same_in_the_same_order_whatever_parameters_they_use(case: str, stage: int) -> None:
    first, second = run_ranks(2, order_of_collectives, case, stage)
    assert first == second
    assert first


def test_units_are_reduced_while_backward_goes_on_in_the_order_of_their_use() -> None:
    """Though the model declares the module that comes first in forward last."""
    sent = run_ranks(2, order_of_collectives, "declared in another order", 3)[0]
    reduced = [entry.split(" of ")[1].split("[")[0] for entry in sent if entry.startswith("reduce")]
    assert reduced[:5] == ["head", "layers.2", "layers.1", "layers.0", "first.outer"]
    last_gather = max(index for index, entry in enumerate(sent) if entry.startswith("all_gather of first"))
    first_reduce = min(index for index, entry in enumerate(sent) if entry.startswith("reduce"))
    assert first_reduce < last_gather, "reduction waited for the end of backward"


def terms_alive(stage: int, case: str) -> int:
    """Most sections with an unreduced gradient at once, over a backward."""
    torch.manual_seed(0)
    engine = engine_for(stage, CASES[case]())
    gradients = engine._sharded.gradients
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        most = max(most, sum(own.term is not None for own in gradients))

    for own in gradients:
        for member in filter(lambda each: each.param.requires_grad, own.section.members):
            member.param.register_post_accumulate_grad_hook(count)
    for step in range(3):
        most = 0
        engine.backward(engine(torch.ones(3, WIDTH), step, 0))
        engine.step()
    return most


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", ["plain", "never used", "declared in another order", "frozen for a while"])
def test_unreduced_gradients_do_not_pile_up_behind_one_that_never_comes(case: str, stage: int) -> None:
    assert max(run_ranks(2, terms_alive, stage, case)) <= 2


# --- use --------------------------------------------------------------------------------------------


class OneOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ParameterList([torch.ones(4), torch.full((4,), 2.0)])
        self.never = nn.Parameter(torch.ones(4))

    def forward(self, which: int) -> Tensor:
        return self.both[which].square().sum()


def use_by_rank(stage: int) -> dict[str, Any]:
    """Rank r uses parameter r in the first step; in the second both use the first one only."""
    engine = engine_for(stage, OneOfTwo())
    seen = []
    for which in (engine.global_rank, 0):
        engine.backward(engine(which))
        engine.step()
        seen.append(whole_weights(engine))
    return {"first": seen[0], "second": seen[1]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_is_used_if_it_is_on_any_rank(stage: int) -> None:
    start = {name: param.detach() for name, param in OneOfTwo().named_parameters()}
    for seen in run_ranks(2, use_by_rank, stage):
        assert differing(seen["first"], start) == ["both.0", "both.1"]
        assert differing(seen["second"], seen["first"]) == ["both.0"], "momentum or decay without a gradient"


def sparse_embedding(stage: int) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    dense = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1))
    dense.load_state_dict(model.state_dict())
    tokens = torch.tensor([[[1, 2], [2, 9]], [[0, 0], [3, 1]]])

    class Loss(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Tensor) -> Tensor:
            return self.inner(batch).square().mean()

    _, expected = train_plain(Loss(dense), tokens, sgd)
    engine = engine_for(stage, Loss(model))
    for batch in tokens:
        engine.backward(engine(batch[engine.global_rank]))
        engine.step()
    return error_between(whole_weights(engine), expected)


def test_sparse_gradients_train_as_dense_ones() -> None:
    for errors in run_ranks(2, lambda: [sparse_embedding(stage) for stage in STAGES]):
        assert all(error < 1e-5 for error in errors), errors


def untrained_gradients(stage: int) -> list[bool]:
    model = Chain()
    engine = start_engine(model, zero_config(stage), lambda copied: torch.optim.SGD(copied.head.parameters(), lr=0.1))
    engine.backward(engine(torch.ones(3, WIDTH), 0, 0))
    return [param.grad is None for param in engine.module.parameters()]


@pytest.mark.parametrize("stage", STAGES)
def test_no_gradient_stays_on_a_parameter(stage: int) -> None:
    """Neither on those that are collected, nor on those that no optimizer has."""
    assert run_ranks(1, untrained_gradients, stage) == [[True] * 14]
