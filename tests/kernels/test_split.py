"""Split masters: 32 bits in, 32 bits out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from kernels.cases import LIBRARIES, any_bits, same
from zerolith import kernels
from zerolith.kernels import native, reference
from zerolith.kernels.backend import Backend

EDGES = [0x00000000, 0x00007FFF, 0x00008000, 0x00018000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
EDGES += [0x7F800000, 0x7F800001, 0x7F807FFF, 0x7F808000, 0x7FBFFFFF, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF]
SPAN = 1 << 20  # patterns at a time: they stay in the cache
TIE, TIES = 0x8000, 0x20000  # every so many patterns one lies midway between an even bf16 below it and an odd one above


def check(backend: Backend, bits: torch.Tensor) -> None:
    """[Note: split] in one place: exact, canonical NaN, nearest, ties away from zero."""
    weight, joined, remainder = there_and_back(backend, bits)
    master = bits.view(torch.float32)
    is_nan = master.isnan()
    assert torch.equal(joined, torch.where(is_nan, 0x7FC00000, bits)), "not exact"
    assert torch.equal(weight.isnan(), is_nan)
    assert (weight[is_nan].view(torch.int16) == 0x7FC0).all()
    assert (remainder[is_nan] == 0).all()
    differs = weight.view(torch.int16) != master.bfloat16().view(torch.int16)
    assert torch.equal(differs & ~is_nan, (bits % TIES == TIE) & ~is_nan), "not the nearest"


def check_span(backend: Backend, bits: torch.Tensor) -> None:
    """The same for consecutive patterns from a multiple of TIES on, none of them NaN, with less work."""
    weight, joined, _ = there_and_back(backend, bits)
    assert torch.equal(joined, bits), "not exact"
    differs = weight.view(torch.int16) != bits.view(torch.float32).bfloat16().view(torch.int16)
    assert differs[TIE::TIES].all()
    assert int(differs.count_nonzero()) == len(bits) // TIES, "not the nearest"


def there_and_back(backend: Backend, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, remainder = torch.empty_like(bits, dtype=torch.bfloat16), torch.empty_like(bits, dtype=torch.int16)
    joined = torch.empty_like(bits)
    backend.split(bits.view(torch.float32), weight, remainder, threads=1)
    backend.join(joined.view(torch.float32), weight, remainder, threads=1)
    return weight, joined, remainder


def all_patterns() -> Iterable[torch.Tensor]:
    steps = torch.arange(SPAN, dtype=torch.int32)
    for start in range(-(2**31), 2**31, SPAN):
        yield steps + start


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_pattern_is_joined_exactly_and_rounded_to_the_nearest() -> None:
    backend = list(LIBRARIES.values())[-1] if LIBRARIES else reference
    for bits in all_patterns():
        may_be_nan = int(bits[-1]) % 2**31 > 0x7F800000
        (check if may_be_nan else check_span)(backend, bits)


@pytest.mark.parametrize("backend", [reference, *LIBRARIES.values()], ids=["reference", *LIBRARIES])
def test_edges_and_a_sample_are_joined_exactly_and_rounded_to_the_nearest(backend: Backend) -> None:
    torch.manual_seed(0)
    edges = torch.tensor(EDGES, dtype=torch.int64)
    check(backend, torch.cat([edges, edges + 0x80000000]).to(torch.uint32).view(torch.int32))
    check(backend, any_bits(1 << 20).view(torch.int32))
    for numel in range(100):
        check(backend, any_bits(numel).view(torch.int32))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_any_pair_of_halves_is_joined_like_the_reference_does(library: native.Library) -> None:
    torch.manual_seed(1)
    weight = any_bits(10_000).view(torch.bfloat16)
    remainder = any_bits(10_000).view(torch.int16)
    mine, other = torch.empty(20_000), torch.empty(20_000)
    library.join(mine, weight, remainder, threads=1)
    reference.join(other, weight, remainder, threads=1)
    assert same(mine, other)


def test_split_and_join_keep_the_shape() -> None:
    master = torch.randn(3, 5, requires_grad=True)
    halves = kernels.split(master)
    assert (halves.weight.shape, halves.weight.dtype) == ((3, 5), torch.bfloat16)
    assert (halves.remainder.shape, halves.remainder.dtype) == ((3, 5), torch.int16)
    assert torch.equal(kernels.join(halves), master)
    room = torch.empty(3, 5)
    assert kernels.join(halves, out=room) is room
    assert torch.equal(room, master)
    assert not room.requires_grad


def test_a_split_master_takes_four_bytes() -> None:
    halves = kernels.split(torch.randn(100))
    assert sum(half.nbytes for half in halves) == 400
