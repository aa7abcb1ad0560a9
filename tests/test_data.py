"""Micro-batches: the same ones at every world size, every sample as often as it should, another order each epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import zerolith
from harness import run_ranks
from plain import MICRO, config_for, make_batches, make_mlp
from zerolith.data import Curriculum, Deal, Loader, MicroBatchSampler, RepeatingLoader, make_loader
from zerolith.errors import UsageError

SIZES = {
    "samples": st.integers(1, 60),
    "micro": st.integers(1, 7),
    "ranks": st.integers(1, 5),
    "drop_last": st.booleans(),
}


def samplers(samples: int, micro: int, ranks: int, drop_last: bool) -> list[MicroBatchSampler]:
    deals = [Deal(micro_batch=micro, rank=rank, num_ranks=ranks, drop_last=drop_last) for rank in range(ranks)]
    return [MicroBatchSampler(samples, deal) for deal in deals]


def epoch_of(samples: int, micro: int, ranks: int, drop_last: bool, *, epoch: int = 0) -> list[list[int]]:
    """All micro-batches of an epoch in their global order."""
    per_rank = []
    for sampler in samplers(samples, micro, ranks, drop_last):
        sampler.epoch = epoch
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


def loader_of(data: Any, micro: int, rank: int, ranks: int, **options: Any) -> Loader:
    return make_loader(
        data, micro_batch=micro, rank=rank, num_ranks=ranks, collate_fn=list, **{"drop_last": True, **options}
    )


def test_each_pass_has_another_order_and_a_named_one_comes_back() -> None:
    loader = loader_of(range(50), 5, 0, 1)
    passes = [list(loader) for _ in range(3)]
    assert len({str(each) for each in passes}) == 3
    assert loader.epoch == 3
    loader.set_epoch(1)
    assert list(loader) == passes[1]
    assert list(loader) == passes[2]
    next(iter(loader))
    assert list(loader) != passes[2], "a pass that was left begins no second time"
    assert loader.epoch == 5


class Stream(IterableDataset):
    """Numbers without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count)


KINDS: dict[str, Callable[[int], Any]] = {"map": range, "stream": Stream}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    samples=st.integers(1, 70),
    before=st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(0, 9)),
    after=st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4)),
)
def test_a_pass_goes_on_at_another_world_size_without_losing_or_repeating_a_sample(
    kind: str, samples: int, before: tuple[int, int, int], after: tuple[int, int]
) -> None:
    ranks, micro, rounds = before
    data = KINDS[kind](samples)
    if samples < ranks * micro:
        return  # refused, or nothing to begin with
    seen: list[int] = []
    loaders = [loader_of(data, micro, rank, ranks) for rank in range(ranks)]
    passes = [iter(loader) for loader in loaders]
    for _ in range(min(rounds, samples // (ranks * micro))):
        seen += [sample for batches in passes for sample in next(batches)]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    whole = [sample for batch in loader_of(data, 1, 0, 1) for sample in batch]
    assert seen == whole[: len(seen)]
    ranks, micro = after
    if samples < ranks * micro:
        return
    loaders = [loader_of(data, micro, rank, ranks) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict(states[0])
    rest = [sample for batches in zip(*loaders, strict=True) for batch in batches for sample in batch]
    left = (samples - len(seen)) // (ranks * micro) * ranks * micro
    if left or kind == "stream":
        assert seen + rest == whole[: len(seen) + left]
    else:
        assert loaders[0].epoch == 2, "the pass was over, so this was the next"


def test_workers_fetch_ahead_and_the_position_does_not_run_ahead_with_them() -> None:
    loader = loader_of(range(40), 4, 0, 1, num_workers=2)
    batches = iter(loader)
    first = [next(batches) for _ in range(3)]
    assert loader.state_dict()["samples"] == 12
    again = loader_of(range(40), 4, 0, 1)
    again.load_state_dict(loader.state_dict())
    assert len(again) == 7
    rest = list(again)
    assert sorted(sample for batch in first + rest for sample in batch) == list(range(40))


def test_a_state_of_other_data_is_refused() -> None:
    state = loader_of(range(10), 2, 0, 1).state_dict()
    for loader in (loader_of(range(12), 2, 0, 1), loader_of(range(10), 2, 0, 1, seed=3)):
        with pytest.raises(UsageError, match="state has"):
            loader.load_state_dict(state)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("samples", [0, 4, 7, 12])
def test_streams_are_dealt_like_datasets(samples: int, ranks: int) -> None:
    for drop_last in (True, False):
        dealt = []
        for rank in range(ranks):
            loader = loader_of(Stream(samples), 2, rank, ranks, drop_last=drop_last)
            dealt.append(list(loader))
        in_order = [sample for batches in zip(*dealt, strict=True) for batch in batches for sample in batch]
        full = samples // (2 * ranks) * 2 * ranks if drop_last else -(-samples // (2 * ranks)) * 2 * ranks
        assert in_order == [position % samples for position in range(full)]
    with pytest.raises(TypeError, match="no length"):
        len(loader_of(Stream(3), 1, 0, 1))
    with pytest.raises(UsageError, match="map-style"):
        loader_of(Stream(3), 1, 0, 1, num_workers=1)


def test_a_repeating_loader_goes_round_and_round() -> None:
    loader = RepeatingLoader(loader_of(range(4), 2, 0, 1))
    batches = [next(loader) for _ in range(6)]
    for round_start in (0, 2, 4):
        assert sorted(batches[round_start] + batches[round_start + 1]) == [0, 1, 2, 3]
    plain = RepeatingLoader([1, 2])
    assert [next(plain) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(UsageError, match="no batches"):
        next(RepeatingLoader([]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_that_is_set_amid_a_pass_is_where_it_goes_on(kind: str) -> None:
    loader = loader_of(KINDS[kind](24), 2, 0, 1)
    batches = RepeatingLoader(loader)
    seen = [next(batches) for _ in range(20)]
    state = loader.state_dict()
    expected = [next(batches) for _ in range(13)]
    loader.load_state_dict(state)
    assert [next(batches) for _ in range(13)] == expected
    loader.set_epoch(0)
    assert [next(batches) for _ in range(20)] == seen
    assert loader.state_dict() == state


def test_a_look_at_a_batch_does_not_move_a_pass_that_runs() -> None:
    loader = loader_of(range(16), 2, 0, 1)
    seen = []
    for number, batch in enumerate(loader):
        seen += batch
        if number % 4 == 0:
            next(iter(loader))
    assert sorted(seen) == list(range(16))


class Dice:
    """A dataset whose samples are random numbers of the worker that fetches them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return torch.rand(()).item()


def test_workers_draw_other_numbers_on_each_rank_in_each_pass_and_for_each_seed() -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        for rank in (0, 1):
            loader = loader_of(Dice(), 2, rank, 2, num_workers=1)
            drawn += [tuple(sample for batch in loader for sample in batch) for _ in range(2)]
    torch.manual_seed(0)
    assert [sample for batch in loader_of(Dice(), 2, 0, 2, num_workers=1) for sample in batch] == [*drawn[0]]
    assert len({*drawn}) == len(drawn)


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


def test_an_iterable_dataset_may_have_a_length() -> None:
    assert list(loader_of(Sized(5), 2, 0, 1)) == list(loader_of(Stream(5), 2, 0, 1)) == [[0, 1], [2, 3]]


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    per_step=st.integers(1, 8),
    steps=st.integers(1, 30),
    root=st.sampled_from([1.0, 2.0]),
)
def test_a_curriculum_shows_every_sample_once_and_long_ones_late(
    lengths: list[int], per_step: int, steps: int, root: float
) -> None:
    curriculum = Curriculum(
        lengths=lengths, shortest=10, longest=100, steps=steps, root=root, samples_per_step=per_step
    )
    order = list(range(len(lengths)))[::-1]
    chosen = curriculum.reorder(order, first_step=0)
    assert sorted(chosen) == sorted(order)
    for start in range(0, len(chosen), per_step):
        limit = curriculum.limit(start // per_step)
        left = chosen[start:]
        short = sum(lengths[sample] <= limit for sample in left)
        too_long = [sample for sample in left[:per_step] if lengths[sample] > limit]
        assert len(too_long) == max(0, min(per_step, len(left)) - short), "only where no shorter one is left"
    assert curriculum.reorder(order, first_step=steps) == order, "afterwards nothing is held back"


def test_the_limit_of_a_curriculum_grows_as_deepspeeds() -> None:
    """floor((t / total) ** (1 / root) * (longest - shortest) + shortest)."""
    line = Curriculum(lengths=[], shortest=8, longest=64, steps=10)
    assert [line.limit(step) for step in (0, 1, 5, 10, 99)] == [8, 13, 36, 64, 64]
    root = Curriculum(lengths=[], shortest=8, longest=64, steps=10, root=2.0)
    assert [root.limit(step) for step in (0, 1, 5, 10)] == [8, 25, 47, 64]
    with pytest.raises(UsageError, match="curriculum"):
        Curriculum(lengths=[], shortest=8, longest=4, steps=10)


def test_a_loader_follows_its_curriculum_at_every_world_size() -> None:
    lengths = [1 + number % 10 for number in range(40)]
    curriculum = Curriculum(lengths=lengths, shortest=2, longest=10, steps=8, samples_per_step=4)
    alone = [sample for batch in loader_of(range(40), 2, 0, 1, curriculum=curriculum) for sample in batch]
    pairs = zip(*(loader_of(range(40), 2, rank, 2, curriculum=curriculum) for rank in range(2)), strict=True)
    assert [sample for batches in pairs for batch in batches for sample in batch] == alone
    assert max(lengths[sample] for sample in alone[:4]) == 2
    assert sorted(alone) == list(range(40))


@pytest.mark.parametrize(
    ("samples", "drop_last", "words"),
    [(3, True, ["3 samples", "4 of them", "2 ranks"]), (0, False, ["empty"]), (0, True, ["empty"])],
)
def test_a_loader_that_would_yield_nothing_is_refused(samples: int, drop_last: bool, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_loader(list(range(samples)), micro_batch=4, rank=0, num_ranks=2, drop_last=drop_last, collate_fn=None)
    for word in words:
        assert word in str(caught.value)


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
