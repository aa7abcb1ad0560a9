"""Collectives over real ranks, and the parts they are made of."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, strategies as st

from harness import run_ranks
from zerolith.comm import Comm, Journal, Pool, add_into, block_squares, communicator, default_comm
from zerolith.layout import BLOCK

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


# --- ordered sums -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    numel=st.sampled_from([1, 7, 256, (1 << 17) + 3]),
    count=st.integers(1, 4),
    fresh=st.booleans(),
    dtypes=st.sampled_from([(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (torch.float64, FP32)]),
)
def test_terms_are_added_from_left_to_right_in_the_dtype_of_the_accumulator(
    seed: int, numel: int, count: int, fresh: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    into_dtype, dtype = dtypes
    generator = torch.Generator().manual_seed(seed)
    into, *terms = (torch.randn(numel, generator=generator) * 100 for _ in range(count + 1))
    into, terms = into.to(into_dtype), [term.to(dtype) for term in terms]
    expected = None if fresh else into.clone()
    for term in terms:
        expected = term.to(into_dtype) if expected is None else expected + term.to(into_dtype)
    before = [term.clone() for term in terms]
    add_into(into, terms, fresh=fresh)
    assert torch.equal(into, expected)
    assert all(torch.equal(one, other) for one, other in zip(terms, before, strict=True))


def test_fresh_does_not_read_what_was_there() -> None:
    into = torch.full((4,), torch.nan)
    add_into(into, [torch.ones(4, dtype=BF16)], fresh=True)
    assert torch.equal(into, torch.ones(4))


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_fresh_term_may_be_the_accumulator(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    into, *others = (torch.randn(BLOCK).to(dtype) for _ in range(count))
    expected, squares = into.clone(), torch.zeros(1, dtype=torch.float64)
    for other in others:
        expected += other
    add_into(into, [into, *others], fresh=True, squares=squares)
    assert torch.equal(into, expected)
    assert torch.equal(squares, block_squares(expected))


# --- pool and journal -------------------------------------------------------------------------------


def test_a_pool_hands_out_what_it_was_given_by_size_and_dtype() -> None:
    pool = Pool(keep=1)
    one, other = pool.take(8, dtype=FP32, device=CPU), pool.take(8, dtype=FP32, device=CPU)
    assert one is not other
    pool.give(one)
    pool.give(other)  # one too many
    assert pool.take(8, dtype=BF16, device=CPU).dtype is BF16
    assert pool.take(9, dtype=FP32, device=CPU).numel() == 9
    assert pool.take(8, dtype=FP32, device=CPU) is one
    assert pool.take(8, dtype=FP32, device=CPU) is not other
    pool.give(one)
    pool.clear()
    assert pool.take(8, dtype=FP32, device=CPU) is not one


def journal_of(*entries: tuple[str, str, int, torch.dtype]) -> Journal:
    journal = Journal()
    for entry in entries:
        journal.note(*entry)
    return journal


A, B = ("a", "all_gather", 8, FP32), ("b", "all_gather", 8, FP32)
DIFFERENT = [
    ("order", [A, B], [B, A]),
    ("operation", [A], [("a", "broadcast from 0", 8, FP32)]),
    ("source", [("a", "broadcast from 1", 8, FP32)], [("a", "broadcast from 0", 8, FP32)]),
    ("size", [A], [("a", "all_gather", 9, FP32)]),
    ("dtype", [A], [("a", "all_gather", 8, torch.int32)]),
    ("number", [A, A], [A]),
]


@pytest.mark.parametrize(("one", "other"), [row[1:] for row in DIFFERENT], ids=[row[0] for row in DIFFERENT])
def test_a_difference_changes_the_fingerprint_and_shows_in_the_diff(one: list, other: list) -> None:
    journals = journal_of(*one), journal_of(*other)
    assert journals[0].fingerprint != journals[1].fingerprint
    diff = journals[0].diff({rank: journal.latest() for rank, journal in enumerate(journals)})
    assert "rank 0: " in diff
    assert "rank 1: " in diff
    assert "\n" not in diff


def test_a_diff_shows_the_first_place_where_ranks_part_even_if_they_issued_different_numbers() -> None:
    common = [A] * 70
    one, other = journal_of(*common, A, B), journal_of(*common, B)
    diff = one.diff({0: one.latest(), 1: other.latest()})
    assert diff == "rank 0: #71 all_gather of a: 8 x float32; rank 1: #71 all_gather of b: 8 x float32"


def test_a_difference_that_is_too_old_is_called_so() -> None:
    one, other = journal_of(A, *[A] * 100), journal_of(B, *[A] * 100)
    assert "older" in one.diff({0: one.latest(), 1: other.latest()})


def test_equal_collectives_have_equal_fingerprints() -> None:
    assert journal_of(A, B).fingerprint == journal_of(A, B).fingerprint


# --- collectives ------------------------------------------------------------------------------------


def expected_bytes(rank: int, seed: int) -> bytes:
    generator = random.Random(1000 * seed + rank)
    return generator.randbytes([0, 1, 300, 7][(rank + seed) % 4])


def check_collectives() -> None:
    comm = default_comm()
    rank, size = comm.rank, comm.size
    for seed in range(5):  # payloads of different lengths, some empty; at last all empty
        payloads = comm.all_gather_bytes(expected_bytes(rank, seed), name="payload")
        assert payloads == [expected_bytes(other, seed) for other in range(size)]
    assert comm.all_gather_bytes(b"", name="nothing") == [b""] * size
    assert comm.sum([1.0, rank], name="sum") == [size, sum(range(size))]
    assert comm.max([-1.0, rank], name="max") == [-1.0, size - 1]
    check_gather_and_reduce(comm)
    tensor = torch.full((3,), float(rank))
    comm.broadcast(tensor, source=size - 1, name="broadcast")
    assert tensor.tolist() == [size - 1] * 3
    comm.broadcast(torch.empty(0), name="nothing")
    # rank r sends r + s elements to rank s
    inp = torch.cat([torch.full((rank + other,), 10.0 * rank + other) for other in range(size)])
    out = torch.empty(sum(rank + other for other in range(size)))
    splits = [rank + other for other in range(size)]
    comm.all_to_all(out, inp, splits, splits, name="ragged")
    assert out.tolist() == [10.0 * other + rank for other in range(size) for _ in range(rank + other)]


def check_gather_and_reduce(comm: Comm) -> None:
    rank, size = comm.rank, comm.size
    whole = torch.zeros(4 * size)
    whole[4 * rank : 4 * rank + 4] = rank
    comm.all_gather(whole, name="gather").wait()
    assert whole.tolist() == [float(other) for other in range(size) for _ in range(4)]
    generator = torch.Generator().manual_seed(3)
    terms = torch.randn(size, 4 * size, generator=generator).bfloat16()
    into = torch.ones(4)
    for fresh in (True, False):
        expected = None if fresh else into.clone()
        for term in terms[:, 4 * rank : 4 * rank + 4].float():
            expected = term if expected is None else expected + term
        comm.reduce_scatter(terms[rank].clone(), into, fresh=fresh, name="reduce").wait()
        assert torch.equal(into, expected)


def check_squares_of_sums(comm: Comm, kept_bytes: int, dtype: torch.dtype) -> None:
    numel = 5 * BLOCK
    generator = torch.Generator().manual_seed(5 + comm.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "KEPT_BYTES", kept_bytes)
        into, squares = torch.ones(numel, dtype=dtype), torch.full((5,), -1.0, dtype=torch.float64)
        for fresh in (True, False):
            whole = torch.randn(comm.size * numel, generator=generator, dtype=dtype)
            comm.reduce_scatter(whole, into, fresh=fresh, squares=squares, name="reduce").wait()
            assert torch.equal(squares, block_squares(into))
            assert torch.allclose(squares, into.double().view(5, -1).square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept_bytes", [2**20, 100], ids=["at once", "in turns"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_reduction_takes_the_squares_of_its_sum(size: int, kept_bytes: int, dtype: torch.dtype) -> None:
    run_ranks(size, lambda: check_squares_of_sums(default_comm(), kept_bytes, dtype))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives_do_what_they_say(size: int) -> None:
    run_ranks(size, check_collectives)


def test_traffic_counts_what_a_ring_would_send() -> None:
    def body() -> None:
        comm = default_comm()
        comm.all_gather(torch.zeros(400), name="gather").wait()
        comm.reduce_scatter(torch.zeros(400, dtype=BF16), torch.zeros(100), fresh=True, name="reduce").wait()
        assert dict(comm.traffic.sent) == {"all_gather": 1200, "reduce_scatter": 600}
        assert dict(comm.traffic.calls) == {"all_gather": 1, "reduce_scatter": 1}
        assert comm.traffic.total == 1800
        comm.traffic.clear()
        assert comm.traffic.total == 0

    run_ranks(4, body)
