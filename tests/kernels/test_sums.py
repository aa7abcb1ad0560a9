"""Sums of terms and square sums: right, and the same whatever computes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels.cases import LIBRARIES, any_bits, same
from zerolith import kernels
from zerolith.kernels import native, reference
from zerolith.kernels.arrays import CHUNK, FORMATS
from zerolith.layout import BLOCK

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
        reference.square_sums(values, expected, threads=1)
        for threads in (1, 2, 3, 100):
            library.square_sums(values, blocks.fill_(-1.0), threads=threads)
            assert torch.equal(blocks, expected)


@each_library
@each_format
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("num_terms", [1, 2, 5])
def test_adding_equals_the_reference(library: native.Library, dtype: torch.dtype, fresh: bool, num_terms: int) -> None:
    torch.manual_seed(1)
    for numel in [*LENGTHS, native.STREAM_FROM + 77]:
        terms = [torch.randn(numel + shift).to(dtype)[shift:] for shift in range(num_terms)]
        for shift in (5, 8):  # the target begins inside a vector, or with one
            target = torch.randn(numel + shift)[shift:]
            expected, squares = target.clone(), room_for_blocks(numel)
            reference.add(expected, terms, squares, fresh=fresh, threads=1)
            for threads in (1, 3):
                mine, blocks = torch.empty(numel + shift)[shift:].copy_(target), room_for_blocks(numel)
                library.add(mine, terms, blocks, fresh=fresh, threads=threads)
                assert torch.equal(mine, expected)
                assert torch.equal(blocks, squares)


@each_library
@each_format
@pytest.mark.parametrize("fresh", [False, True])
def test_each_addition_rounds_once_from_the_left(library: native.Library, dtype: torch.dtype, fresh: bool) -> None:
    torch.manual_seed(2)
    terms, target = [any_bits(2000).to(dtype) for _ in range(3)], any_bits(2000)
    first, second, third = (term.float() for term in terms)
    expected = first + second + third if fresh else target + first + second + third
    library.add(target, terms, None, fresh=fresh, threads=1)
    assert same(target, expected)


def test_one_fresh_term_is_itself_minus_zero_included() -> None:
    values = torch.tensor([-0.0, 0.0, 1.5])
    target = torch.full((3,), torch.nan)
    kernels.add(target, [values], fresh=True)
    assert same(target, values)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e18, 1e30])
def test_the_sum_of_a_block_is_near_the_true_one(scale: float) -> None:
    """Each of the at most 16 + 4 additions on the way of an element rounds by 2**-53."""
    torch.manual_seed(3)
    values = torch.randn(4 * CHUNK) * scale
    for block, mine in zip(values.split(BLOCK), kernels.square_sums(values).tolist(), strict=True):
        true = math.fsum(value * value for value in block.tolist())
        assert abs(mine - true) <= 20 * 2**-53 * true


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.full((CHUNK + 400,), torch.finfo(dtype).max, dtype=dtype)
    assert kernels.square_sums(values).isfinite().all()
    for place in (0, 17, 255, 256, CHUNK - 1, CHUNK, CHUNK + 399):
        values[place] = bad
        added = room_for_blocks(len(values))
        kernels.add(torch.zeros(len(values)), [values], blocks=added)
        for blocks in (kernels.square_sums(values), added):
            assert torch.nonzero(~blocks.isfinite()).flatten().tolist() == [place // BLOCK]
        values[place] = 1.0


def test_an_overflow_of_the_addition_is_found() -> None:
    target, blocks = torch.full((300,), 3e38), room_for_blocks(300)
    kernels.add(target, [target.clone()], blocks=blocks)
    assert blocks.tolist() == [math.inf, math.inf]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=600))
@settings(deadline=None)
def test_blocks_of_any_values_are_those_of_the_reference(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    expected = room_for_blocks(len(bits))
    reference.square_sums(values, expected, threads=1)
    for library in LIBRARIES.values():
        blocks = room_for_blocks(len(bits))
        library.square_sums(values, blocks, threads=1)
        assert same(blocks, expected)


def test_shards_have_the_blocks_of_the_whole() -> None:
    torch.manual_seed(4)
    values = torch.randn(40 * BLOCK)
    parts = [kernels.square_sums(values[start * BLOCK : stop * BLOCK]) for start, stop in [(0, 7), (7, 24), (24, 40)]]
    assert torch.equal(torch.cat(parts), kernels.square_sums(values))
