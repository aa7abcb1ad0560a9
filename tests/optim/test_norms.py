"""The gradient norm is exact, and its bits depend on nothing but the gradients."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from zerolith.buffer import FlatBuffer
from zerolith.comm import block_squares
from zerolith.layout import plan_layout
from zerolith.optim import GradientFacts, examine
from zerolith.partitioning import REPLICATE, SHARD

SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=6)


class Threads:
    """Ranks as threads of one process, for the few collectives that `examine` needs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def run(self, body: Callable[[Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = body(OneThread(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class OneThread:
    """What `examine` sees of a Comm."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size
        self.journal = SimpleNamespace(fingerprint=7)

    def exchange(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait()
        values = list(self.threads.values)
        self.threads.barrier.wait()
        return values

    def max(self, values: Sequence[float], *, name: str) -> list[float]:
        assert not any(map(math.isnan, values))
        return [max(column) for column in zip(*self.exchange(list(values)), strict=True)]

    def sum(self, values: Sequence[float], *, name: str) -> list[float]:
        return [sum(column) for column in zip(*self.exchange(list(values)), strict=True)]

    def all_gather_bytes(self, payload: bytes, *, name: str) -> list[bytes]:
        return self.exchange(payload)

    def check_journals(self, highest: float, negated_lowest: float, *, name: str) -> None:
        assert highest == -negated_lowest == 7


def facts_of(tensors: list[Tensor], *, world: int, bucket: int, whole: bool = False) -> list[GradientFacts]:
    """What each of `world` ranks learns of these gradients, with `bucket` tensors in a section."""

    def body(comm: Any) -> GradientFacts:
        sections = []
        for start in range(0, len(tensors), bucket):
            members = tensors[start : start + bucket]
            layout = plan_layout([tensor.shape for tensor in members], num_shards=world)
            buffer = FlatBuffer.empty(
                layout, REPLICATE, rank=comm.rank, dtype=members[0].dtype, device=members[0].device
            )
            buffer.zero_gaps()
            for index, tensor in enumerate(members):
                buffer.slot(index).copy_(tensor)
            total = buffer if whole else FlatBuffer(layout, SHARD, buffer.own().data, rank=comm.rank)
            names = [SimpleNamespace(name=f"p{start + index}") for index in range(len(members))]
            section = SimpleNamespace(layout=layout, members=names)
            squares = block_squares(total.own().data)
            sections.append(SimpleNamespace(section=section, squares=squares, used=[True] * len(members)))
        return examine(sections, comm, fingerprint=True)

    return Threads(world).run(body)


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    """Tensors whose scales lie apart by up to twelve orders of magnitude."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 6)) for shape in draw(SHAPES)]


@settings(deadline=None, max_examples=60)
@given(tensors=gradients(), world=st.integers(1, 5), bucket=st.integers(1, 6), whole=st.booleans())
def test_the_norm_is_that_of_fp64_and_has_the_bits_of_one_rank(
    tensors: list[Tensor], world: int, bucket: int, whole: bool
) -> None:
    exact = math.sqrt(math.fsum(float(value) ** 2 for tensor in tensors for value in tensor.double().flatten()))
    (alone,) = facts_of(tensors, world=1, bucket=len(tensors))
    assert abs(alone.norm - exact) <= 1e-14 * exact
    for facts in facts_of(tensors, world=world, bucket=bucket, whole=whole):
        assert facts == alone._replace(used=facts.used)
        assert not facts.overflow
        assert facts.culprit == ""


@settings(deadline=None, max_examples=30)
@given(
    tensors=gradients(),
    world=st.integers(1, 4),
    where=st.integers(0, 10**6),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_one_bad_number_anywhere_is_an_overflow_for_every_rank_and_its_parameter_is_named(
    tensors: list[Tensor], world: int, where: int, value: float
) -> None:
    number = where % len(tensors)
    tensors[number].view(-1)[where % tensors[number].numel()] = value
    for facts in facts_of(tensors, world=world, bucket=2):
        assert facts.overflow
        assert facts.norm == math.inf
        assert facts.culprit.startswith(f"p{number} (shard of rank ")


def test_no_gradient_at_all_has_norm_zero() -> None:
    (facts,) = facts_of([torch.zeros(300), torch.zeros(2, 2)], world=1, bucket=2)
    assert facts.norm == 0.0
    assert not facts.overflow


def test_half_precision_sums_have_the_norm_of_their_values() -> None:
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 300.0)):  # 300: the norm is beyond fp16
        tensors = [torch.randn(1000).mul(scale).to(dtype), torch.randn(20, 30).mul(scale).to(dtype)]
        exact = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
        for facts in facts_of(tensors, world=2, bucket=2):
            assert abs(facts.norm - exact) <= 1e-14 * exact


def test_finite_numbers_whose_squares_are_beyond_fp32_are_no_overflow() -> None:
    tensors = [torch.tensor([3e30, -4e30]), torch.ones(5)]
    for facts in facts_of(tensors, world=2, bucket=2):
        assert not facts.overflow
        assert abs(facts.norm - math.hypot(*tensors[0].tolist())) <= 1e-14 * facts.norm
