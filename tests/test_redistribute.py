"""Every move between placements against the same thing computed on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from models import zero_config  # noqa: F401  # loads in the parent what the ranks need
from zerolith.buffer import FlatBuffer
from zerolith.comm import default_comm
from zerolith.layout import BLOCK, Layout, plan_layout
from zerolith.partitioning import PARTIAL, REPLICATE, SHARD, Placement
from zerolith.redistribute import TRANSITIONS, redistribute

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]
SHAPES = [(3, BLOCK), (5,), (), (0, 4), (2, 300)]


def content(layout: Layout, dtype: torch.dtype, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.numel, generator=generator, dtype=torch.float64).to(dtype)


def held(layout: Layout, placement: Placement, terms: list[Tensor], rank: int) -> FlatBuffer:
    """A buffer of that placement: its own term if PARTIAL, else (its part of) the first."""
    if placement is PARTIAL:
        return FlatBuffer(layout, placement, terms[rank].clone(), rank=rank)
    whole = FlatBuffer(layout, REPLICATE, terms[0].clone(), rank=rank)
    return whole if placement is REPLICATE else FlatBuffer(layout, SHARD, whole.own().data.clone(), rank=rank)


def expected(source: Placement, terms: list[Tensor], before: Tensor, *, fresh: bool) -> Tensor:
    """What the target holds afterwards, whole: additions in its own dtype, in rank order."""
    if source is not PARTIAL:
        return terms[0].to(before.dtype)
    summands = [term.to(before.dtype) for term in terms]
    total = summands.pop(0).clone() if fresh else before.clone()
    for summand in summands:
        total += summand
    return total


def check_every_move(fresh: bool) -> None:
    comm = default_comm()
    layout = plan_layout(SHAPES, num_shards=comm.size)
    for source_dtype, target_dtype in DTYPES:
        terms = [content(layout, source_dtype, seed=seed) for seed in range(comm.size)]
        before = content(layout, target_dtype, seed=99)
        for source, target in TRANSITIONS:
            if source is not PARTIAL and not fresh:
                continue
            from_buffer = held(layout, source, terms, comm.rank)
            to_buffer = held(layout, target, [before], comm.rank)
            sent = from_buffer.data.clone()
            redistribute(from_buffer, to_buffer, comm=comm, name="move", fresh=fresh).wait()
            whole = expected(source, terms, before, fresh=fresh)
            right = whole if target is REPLICATE else whole[slice(*layout.shard(comm.rank))]
            what = f"{source} {source_dtype} to {target} {target_dtype}"
            assert torch.equal(to_buffer.data, right), what
            assert torch.equal(from_buffer.data, sent), f"{what}: the source was written to"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_move_is_what_one_process_computes_bit_for_bit(world: int) -> None:
    run_ranks(world, check_every_move, True)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sum_can_be_added_to_what_is_there(world: int) -> None:
    """To a shard; a replicated target is filled from every rank's shard of it, so there it is the same."""
    run_ranks(world, check_every_move, False)


def sum_of_large_and_small(target: Placement) -> list[float]:
    comm = default_comm()
    layout = plan_layout([(BLOCK * comm.size,)], num_shards=comm.size)
    term = [1e8, 1.0, -1e8, 1.0][comm.rank]
    source = FlatBuffer(layout, PARTIAL, torch.full((layout.numel,), term), rank=comm.rank)
    sums = FlatBuffer.empty(layout, target, rank=comm.rank, dtype=torch.float32, device=comm.device)
    redistribute(source, sums, comm=comm, name="sum").wait()
    return sums.data.unique().tolist()


@pytest.mark.parametrize("target", [SHARD, REPLICATE])
def test_sums_are_in_rank_order(target: Placement) -> None:
    """((1e8 + 1) - 1e8) + 1 is 1 in fp32; other orders give 0 or 2."""
    assert run_ranks(4, sum_of_large_and_small, target) == [[1.0]] * 4


def move_within_one_memory() -> dict[str, Any]:
    comm = default_comm()
    layout = plan_layout([(BLOCK * comm.size,)], num_shards=comm.size)
    whole = FlatBuffer(layout, PARTIAL, torch.full((layout.numel,), comm.rank + 1.0), rank=comm.rank)
    redistribute(whole, whole.own(), comm=comm, name="reduce in place").wait()
    summed = FlatBuffer(layout, REPLICATE, whole.data, rank=comm.rank)
    own = summed.own().data.tolist()
    redistribute(summed.own(), summed, comm=comm, name="gather in place").wait()
    return {"own": set(own), "all": set(summed.data.tolist()), "moved": comm.traffic.total}


def test_buffers_over_one_memory_are_moved_in_place() -> None:
    for result in run_ranks(2, move_within_one_memory):
        assert result == {"own": {3.0}, "all": {3.0}, "moved": 2 * BLOCK * 4}


def count_calls_where_placements_agree() -> int:
    comm = default_comm()
    layout = plan_layout(SHAPES, num_shards=comm.size)
    for source, target in [(REPLICATE, SHARD), (REPLICATE, REPLICATE), (SHARD, SHARD)]:
        terms = [content(layout, torch.float32, seed=0)]
        moved = redistribute(
            held(layout, source, terms, comm.rank), held(layout, target, terms, comm.rank), comm=comm, name="none"
        )
        moved.wait()
    return sum(comm.traffic.calls.values())


def test_moves_to_what_a_rank_has_already_do_not_communicate() -> None:
    assert run_ranks(2, count_calls_where_placements_agree) == [0, 0]


def test_a_released_buffer_keeps_its_views_and_takes_no_memory() -> None:
    layout = plan_layout([(3, 4), (2,)], num_shards=1)
    buffer = FlatBuffer.empty(layout, REPLICATE, rank=0, dtype=torch.float32, device=torch.device("cpu"))
    view = buffer.slot(0)
    buffer.release()
    assert (buffer.is_allocated, view.untyped_storage().nbytes()) == (False, 0)
    buffer.allocate()
    buffer.slot(0).fill_(7.0)
    assert view.shape == (3, 4)
    assert bool((view == 7.0).all())
