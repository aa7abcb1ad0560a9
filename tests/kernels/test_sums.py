"""Square sums: near the true one, and the same whatever computes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels.cases import LIBRARIES, any_bits, same
from zerolith import kernels
from zerolith.kernels import native, reference
from zerolith.kernels.arrays import BLOCK, CHUNK, FORMATS

each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
each_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)
LENGTHS = [0, 1, 15, 16, 255, 256, 257, 1000, CHUNK - 1, CHUNK + 1, 5 * CHUNK + 300]


def room_for_blocks(numel: int) -> torch.Tensor:
    return torch.full((-(-numel // BLOCK),), -1.0, dtype=torch.float64)


@each_library
@each_format
def test_sums_equal_the_reference_with_any_number_of_threads(library: native.Library, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for numel in LENGTHS:
        values = torch.randn(numel + 3).to(dtype)[3:]
        expected, blocks = room_for_blocks(numel), room_for_blocks(numel)
        total = reference.square_sum(values, expected, threads=1)
        for threads in (1, 2, 3, 100):
            assert library.square_sum(values, blocks, threads=threads) == total
            assert torch.equal(blocks, expected)
        assert library.square_sum(values, None, threads=2) == total


@each_library
@each_format
def test_accumulating_equals_the_reference(library: native.Library, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for numel in LENGTHS:
        values, target = torch.randn(numel + 1).to(dtype)[1:], torch.randn(numel + 5)[5:]
        expected = target.clone()
        total = reference.accumulate(expected, values, None, threads=1)
        for threads in (1, 2, 3):
            mine, blocks = target.clone(), room_for_blocks(numel)
            assert library.accumulate(mine, values, blocks, threads=threads) == total
            assert torch.equal(mine, expected)
            assert library.square_sum(expected, None, threads=1) == total


@each_library
@each_format
def test_accumulating_rounds_each_sum_once(library: native.Library, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    values, target = any_bits(2000).to(dtype), any_bits(2000)
    expected = target + values.float()
    library.accumulate(target, values, None, threads=1)
    assert same(target, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e18, 1e30])
def test_the_sum_is_near_the_true_one(scale: float) -> None:
    """Each of the at most 16 + 4 + 256 + 4 additions on the way of an element rounds by 2**-53."""
    torch.manual_seed(3)
    values = torch.randn(4 * CHUNK) * scale
    true = math.fsum(value * value for value in values.tolist())
    total, finite = kernels.square_sum(values)
    assert finite
    assert abs(total - true) <= 280 * 2**-53 * true


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.full((CHUNK + 400,), torch.finfo(dtype).max, dtype=dtype)
    assert kernels.square_sum(values).finite
    for place in (0, 17, 255, 256, CHUNK - 1, CHUNK, CHUNK + 399):
        values[place] = bad
        blocks = room_for_blocks(len(values))
        assert not kernels.square_sum(values, blocks=blocks).finite
        assert torch.nonzero(~blocks.isfinite()).flatten().tolist() == [place // BLOCK]
        assert not kernels.accumulate(torch.zeros(len(values)), values).finite
        values[place] = 1.0


def test_an_overflow_of_the_addition_is_found() -> None:
    target, grad = torch.full((300,), 3e38), torch.full((300,), 3e38)
    assert kernels.accumulate(target, grad) == (math.inf, False)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=600))
@settings(deadline=None)
def test_blocks_of_any_values_are_those_of_the_reference(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    expected = room_for_blocks(len(bits))
    total = reference.square_sum(values, expected, threads=1)
    for library in LIBRARIES.values():
        blocks = room_for_blocks(len(bits))
        mine = library.square_sum(values, blocks, threads=1)
        assert mine == total or (math.isnan(mine) and math.isnan(total))
        assert same(blocks, expected)


def test_shards_have_the_blocks_of_the_whole() -> None:
    torch.manual_seed(4)
    values = torch.randn(40 * BLOCK)
    whole, parts = room_for_blocks(len(values)), room_for_blocks(len(values))
    kernels.square_sum(values, blocks=whole)
    for start, stop in [(0, 7), (7, 24), (24, 40)]:
        kernels.square_sum(values[start * BLOCK : stop * BLOCK], blocks=parts[start:stop])
    assert torch.equal(parts, whole)
