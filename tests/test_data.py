"""Micro-batches: the same ones at every world size, every sample as often as it should, another order each epoch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import zerolith
from harness import run_ranks
from plain import MICRO, config_for, make_batches, make_mlp
from zerolith.data import MicroBatchSampler, make_loader
from zerolith.errors import UsageError

SIZES = {
    "samples": st.integers(1, 60),
    "micro": st.integers(1, 7),
    "ranks": st.integers(1, 5),
    "drop_last": st.booleans(),
}


def samplers(samples: int, micro: int, ranks: int, drop_last: bool) -> list[MicroBatchSampler]:
    return [
        MicroBatchSampler(samples, micro_batch=micro, rank=rank, num_ranks=ranks, drop_last=drop_last)
        for rank in range(ranks)
    ]


def epoch_of(samples: int, micro: int, ranks: int, drop_last: bool, *, epoch: int = 0) -> list[list[int]]:
    """All micro-batches of an epoch in their global order."""
    per_rank = []
    for sampler in samplers(samples, micro, ranks, drop_last):
        sampler.set_epoch(epoch)
        per_rank.append(list(sampler))
    return [batch for batches in zip(*per_rank, strict=True) for batch in batches]


@given(**SIZES)
def test_every_rank_gets_the_same_number_of_full_micro_batches(
    samples: int, micro: int, ranks: int, drop_last: bool
) -> None:
    lengths = set()
    for sampler in samplers(samples, micro, ranks, drop_last):
        batches = list(sampler)
        lengths.add(len(batches))
        assert len(batches) == len(sampler)
        assert all(len(batch) == micro for batch in batches)
    assert lengths == {samples // (micro * ranks) if drop_last else -(-samples // (micro * ranks))}


@given(**SIZES)
def test_the_ledger_of_an_epoch_is_exact(samples: int, micro: int, ranks: int, drop_last: bool) -> None:
    seen = Counter(index for batch in epoch_of(samples, micro, ranks, drop_last) for index in batch)
    step = micro * ranks
    assert set(seen) <= set(range(samples))
    if drop_last:
        assert set(seen.values()) <= {1}
        assert len(seen) == samples // step * step
    else:
        assert len(seen) == samples
        assert sum(seen.values()) == -(-samples // step) * step
        assert max(seen.values()) - min(seen.values()) <= 1


@given(samples=st.integers(1, 60), micro=st.integers(1, 7), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_a_micro_batch_holds_the_same_samples_at_every_world_size(
    samples: int, micro: int, ranks: int, epoch: int
) -> None:
    alone = epoch_of(samples, micro, 1, False, epoch=epoch)
    together = epoch_of(samples, micro, ranks, False, epoch=epoch)
    assert together[: len(alone)] == alone


def test_each_epoch_has_another_order_and_a_named_one_comes_back() -> None:
    (sampler,) = samplers(50, 5, 1, True)
    epochs = [list(sampler) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert sampler.epoch == 3
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    assert list(sampler) == epochs[2]


@pytest.mark.parametrize(
    ("samples", "drop_last", "words"),
    [(3, True, ["3 samples", "4 of them", "2 ranks"]), (0, False, ["empty"]), (0, True, ["empty"])],
)
def test_a_loader_that_would_yield_nothing_is_refused(samples: int, drop_last: bool, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_loader(list(range(samples)), micro_batch=4, rank=0, num_ranks=2, drop_last=drop_last, collate_fn=None)
    for word in words:
        assert word in str(caught.value)


def test_data_without_a_length_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(UsageError, match="Stream without a length"):
        make_loader(Stream(), micro_batch=4, rank=0, num_ranks=2, drop_last=False, collate_fn=None)


def test_training_data_trains_the_same_at_one_two_and_four_ranks() -> None:
    """Two epochs of a data set that does not fill its last global batch."""
    (batch,) = make_batches(1, 22)
    data = TensorDataset(*batch)

    def body() -> dict[str, torch.Tensor]:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        config = config_for(2, gas=4 // ranks, reproducible=True, dataloader_drop_last=True)
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine, _, loader, _ = zerolith.initialize(model=model, optimizer=optimizer, training_data=data, config=config)
        assert loader is engine.training_dataloader
        assert len(loader) == 22 // (MICRO * ranks)
        for _ in range(2):
            for x, y in list(loader)[: 8 // ranks]:
                engine.backward(nn.functional.mse_loss(engine(x), y))
                engine.step()
        assert engine.global_steps == 4
        return {name: param.detach().clone() for name, param in model.named_parameters()}

    first = body()
    for ranks in (2, 4):
        for weights in run_ranks(ranks, body):
            assert all(torch.equal(weights[name], first[name]) for name in first)


def test_collate_fn_makes_the_batches() -> None:
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = zerolith.initialize(
        model=model, optimizer=optimizer, training_data=[1, 2, 3, 4], collate_fn=tuple, config=config_for(0)
    )[2]
    batches = list(loader)
    assert all(type(batch) is tuple and len(batch) == MICRO for batch in batches)
    assert sorted(sample for batch in batches for sample in batch) == [1, 2, 3, 4]


def test_without_training_data_there_is_no_loader() -> None:
    engine, _, loader, _ = zerolith.initialize(model=make_mlp(), config=config_for(0))
    assert loader is None
    assert engine.training_dataloader is None
