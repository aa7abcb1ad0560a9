"""Layouts: integers that must tile, not overlap, and be cut at blocks, for any shapes and any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from zerolith.layout import BLOCK, Layout, Range, assign_owners, boxes, plan_layout

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
shapes = st.lists(
    st.lists(st.one_of(st.integers(0, 5), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1])), max_size=3).map(tuple),
    max_size=6,
)
worlds = st.integers(1, 9)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    drawn = draw(shapes)
    groups = sorted(draw(st.integers(0, 2)) for _ in drawn)
    return plan_layout(drawn, num_shards=draw(worlds), groups=groups)


@quick
@given(layouts())
def test_slots_follow_each_other_at_multiples_of_a_block(layout: Layout) -> None:
    cursor = 0
    for slot in layout.slots:
        assert slot.start % BLOCK == 0
        assert slot.start == cursor, "slots overlap or leave more than the rest of a block between them"
        assert 0 <= slot.padded.numel - slot.numel < BLOCK
        cursor = slot.padded.stop
    assert cursor <= layout.numel


@quick
@given(layouts())
def test_shards_are_equal_cover_the_buffer_and_are_cut_at_blocks(layout: Layout) -> None:
    shards = [layout.shard(rank) for rank in range(layout.num_shards)]
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert shards[-1].stop == layout.numel
    assert {shard.numel for shard in shards} == {layout.shard_numel}
    assert layout.shard_numel % BLOCK == 0


@quick
@given(layouts())
def test_padding_is_less_than_a_block_for_each_tensor_and_each_rank(layout: Layout) -> None:
    used = sum(slot.numel for slot in layout.slots)
    assert layout.numel - used <= BLOCK * (len(layout.slots) + layout.num_shards)


@quick
@given(layouts())
def test_what_the_ranks_own_of_a_slot_makes_up_the_slot(layout: Layout) -> None:
    for index, slot in enumerate(layout.slots):
        owned = [layout.owned(index, rank) for rank in range(layout.num_shards)]
        parts = [part for part in owned if part.numel]
        assert sum(part.numel for part in parts) == slot.numel
        assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]


@quick
@given(layouts())
def test_gaps_are_all_that_slots_leave(layout: Layout) -> None:
    parts = sorted(part for part in [*(slot.span for slot in layout.slots), *layout.gaps()] if part.numel)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == layout.numel


@quick
@given(layouts())
def test_group_ranges_cover_every_slot_once_with_its_own_group(layout: Layout) -> None:
    runs = layout.group_ranges()
    for slot in layout.slots:
        holders = [group for group, run in runs if slot.span.clip(run).numel]
        assert holders == ([slot.group] if slot.numel else [])
    assert len(runs) <= len({slot.group for slot in layout.slots}), "tensors of one group are not in one piece"


def test_a_layout_of_tensors_without_elements_has_a_block_for_each_rank() -> None:
    layout = plan_layout([(0,), (3, 0)], num_shards=3)
    assert layout.shard_numel == BLOCK
    assert layout.gaps() == [Range(0, 3 * BLOCK)]
    assert layout.owned(1, 2).numel == 0


def test_a_tensor_without_dimensions_has_one_element() -> None:
    layout = plan_layout([(), (2,)], num_shards=2)
    assert [slot.span for slot in layout.slots] == [Range(0, 1), Range(BLOCK, BLOCK + 2)]


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], Range]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, Range(start, draw(st.integers(start, numel)))


@quick
@given(flat_ranges())
def test_boxes_tile_a_flat_range_exactly_and_in_order(case: tuple[tuple[int, ...], Range]) -> None:
    shape, flat = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    found: list[int] = []
    tiles = boxes(shape, flat)
    for box in tiles:
        part = numbers[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
        assert part.flatten()[0] == box.start
        found += part.flatten().tolist()
    assert found == list(range(flat.start, flat.stop))
    assert len(tiles) <= max(1, 2 * len(shape) - 1)


@quick
@given(shapes, worlds)
def test_owners_share_the_work_within_one_tensor_of_each_other(drawn: list[tuple[int, ...]], world: int) -> None:
    loads = [0.0] * world
    owners = assign_owners(drawn, loads)
    assert all(0 <= owner < world for owner in owners)
    costs = [math.prod(shape) * (min(shape) if len(shape) > 1 else 1) for shape in drawn]
    totals = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world)]
    assert totals == loads
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_owners_go_on_from_the_loads_that_there_are() -> None:
    loads = [100.0, 0.0]
    assert assign_owners([(4, 4), (2, 2)], loads) == [1, 1]
    assert loads == [100.0, 4 * 4 * 4 + 2 * 2 * 2]


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [((0, 4), (2, 6), (2, 4)), ((2, 6), (0, 4), (2, 4)), ((0, 2), (4, 6), (4, 4)), ((4, 6), (0, 2), (4, 4))],
)
def test_ranges_without_a_common_part_clip_to_nothing(first: tuple, second: tuple, common: tuple) -> None:
    assert Range(*first).clip(Range(*second)) == Range(*common)
