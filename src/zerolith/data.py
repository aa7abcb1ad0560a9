"""Samples for each rank: the same micro-batches whatever the number of ranks, and a position that can be resumed."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from zerolith.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """How micro-batches are dealt out: number k of an epoch goes to rank k % num_ranks."""

    micro_batch: int  # samples
    rank: int
    num_ranks: int
    drop_last: bool  # what does not fill a micro-batch for every rank is dropped, or filled up from the epoch's start

    @property
    def per_round(self) -> int:
        """Samples in one micro-batch of every rank."""
        return self.micro_batch * self.num_ranks

    def rounds(self, num_samples: int) -> int:
        """Micro-batches of each rank."""
        return num_samples // self.per_round if self.drop_last else -(-num_samples // self.per_round)

    def mine(self, start: int) -> range:
        """Positions of this rank's samples in the round that begins at `start`."""
        first = start + self.rank * self.micro_batch
        return range(first, first + self.micro_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """Short samples first: until `steps`, none is longer than a limit that grows, as long as shorter ones are left.

    lengths: of each sample. The limit after t optimizer steps is shortest + (longest - shortest) * (t / steps) ** (1 /
    root), as DeepSpeed's fixed_root schedule; root 1 is a line. Every sample still comes once per epoch.
    """

    lengths: Sequence[int]
    shortest: int
    longest: int
    steps: int
    root: float = 1.0
    samples_per_step: int = 1  # of all ranks

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.longest or self.steps < 1 or self.root <= 0 or self.samples_per_step < 1:
            raise UsageError(
                f"curriculum: needs 0 < shortest <= longest and positive steps, root and samples_per_step, not {self}"
            )

    def limit(self, step: int) -> int:
        """The longest sample that optimizer step `step`, counted from 0, should see."""
        grown = min(1.0, step / self.steps) ** (1 / self.root)
        return math.floor(self.shortest + (self.longest - self.shortest) * grown)

    def reorder(self, order: Sequence[int], *, first_step: int) -> list[int]:
        """The samples of an epoch that begins at optimizer step `first_step`."""
        by_length = sorted(order, key=self.lengths.__getitem__)  # stable: among equals the shuffled order stays
        place = {sample: position for position, sample in enumerate(order)}
        sizes = [self.lengths[sample] for sample in by_length]
        out: list[int] = []
        ready: list[tuple[int, int]] = []  # a heap: short enough, by their place in the shuffled order
        taken = 0  # of by_length
        while len(out) < len(order):
            limit = self.limit(first_step + len(out) // self.samples_per_step)
            wanted = min(len(order), len(out) + self.samples_per_step)
            until = max(bisect_right(sizes, limit), wanted)  # where too few are short enough, the next longer ones
            for sample in by_length[taken:until]:
                heappush(ready, (place[sample], sample))
            taken = max(taken, until)
            out += [heappop(ready)[1] for _ in range(wanted - len(out))]
        return out


class MicroBatchSampler(Sampler[list[int]]):
    """Index lists of one rank. Each epoch is shuffled anew from `seed` and the epoch's number, alike on all ranks."""

    def __init__(
        self, num_samples: int, deal: Deal, *, seed: int = 0, shuffle: bool = True, curriculum: Curriculum | None = None
    ) -> None:
        self.num_samples = num_samples
        self.deal = deal
        self.seed = seed
        self.shuffle = shuffle
        self.curriculum = curriculum
        self.epoch = 0
        self.start = 0  # samples of the epoch that have been trained on before

    def __len__(self) -> int:
        return self.deal.rounds(self.num_samples - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for round_start in range(self.start, self.start + len(self) * self.deal.per_round, self.deal.per_round):
            yield [order[position % self.num_samples] for position in self.deal.mine(round_start)]

    def _order(self) -> Sequence[int]:
        if not self.shuffle:
            order: Sequence[int] = range(self.num_samples)
        else:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        if self.curriculum is None:
            return order
        steps_per_epoch = -(-self.num_samples // self.curriculum.samples_per_step)
        return self.curriculum.reorder(order, first_step=self.epoch * steps_per_epoch)


class _Dealt(IterableDataset[Any]):
    """One rank's samples of a stream, which every rank reads."""

    def __init__(self, stream: Iterable[Any], deal: Deal) -> None:
        self.stream = stream
        self.deal = deal
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.stream)
        head: list[Any] = []  # of the stream, to fill up the last round from
        for sample in islice(samples, self.start):
            if len(head) < self.deal.per_round and not self.deal.drop_last:
                head.append(sample)
        while block := list(islice(samples, self.deal.per_round)):
            if len(head) < self.deal.per_round and not self.deal.drop_last:
                head += block[: self.deal.per_round - len(head)]
            if len(block) < self.deal.per_round:
                if self.deal.drop_last:
                    return
                block += [head[position % len(head)] for position in range(self.deal.per_round - len(block))]
            yield from (block[position] for position in self.deal.mine(0))


class Loader:
    """This rank's micro-batches of one epoch after another; `state_dict` is its position.

    Iterating begins an epoch, or goes on in the one that `load_state_dict` took back. A batch counts as trained on
    from the moment that it is handed out. Each pass over a shuffled dataset has an order of its own.
    """

    def __init__(self, source: MicroBatchSampler | _Dealt, loader: DataLoader[Any], deal: Deal) -> None:
        self._source = source
        self._loader = loader
        self._deal = deal
        self.epoch = 0
        self._taken = 0  # micro-batches of each rank since `_source.start`
        self._begun = False
        self._moves = 0  # how often the position was set from outside

    @property
    def dataset(self) -> Any:
        return self._source.stream if isinstance(self._source, _Dealt) else self._loader.dataset

    @property
    def num_samples(self) -> int | None:
        """Of the dataset, on all ranks; None of a stream."""
        return self._source.num_samples if isinstance(self._source, MicroBatchSampler) else None

    def __len__(self) -> int:
        """Micro-batches of each rank that one pass has, or that are left of the one to be resumed."""
        if isinstance(self._source, _Dealt):
            raise TypeError("a loader of an iterable dataset has no length")
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self._begin(self.epoch + 1)
        moves = -1
        while moves != self._moves:  # who sets the position amid a pass goes on from there
            moves, self._begun = self._moves, True
            if self._loader.generator is not None:
                self._loader.generator.manual_seed(self._seed())
            if isinstance(self._source, MicroBatchSampler):
                self._source.epoch = self.epoch
            for batch in self._loader:
                self._taken += 1
                yield batch
                if moves != self._moves:
                    break
        self._begin(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be epoch `epoch` from its beginning; one that runs goes on there."""
        self._begin(epoch)
        self._moves += 1

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._source.start = self._taken = 0
        self._begun = False

    def state_dict(self) -> dict[str, int]:
        """The same on every rank; may be loaded at another number of ranks and another micro-batch."""
        return {"epoch": self.epoch, "samples": self._source.start + self._taken * self._deal.per_round} | self._kind()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch that was handed out. Raises UsageError for another dataset or another order."""
        for name, value in self._kind().items():
            if state.get(name) != value:
                raise UsageError(f"the loader's state has {name} {state.get(name)}, this loader {value}")
        self.set_epoch(state["epoch"])
        self._source.start = state["samples"]
        if self.num_samples is not None and self._deal.rounds(self.num_samples - state["samples"]) <= 0:
            self.set_epoch(state["epoch"] + 1)

    def _seed(self) -> int:
        """Of the pass that begins: worker processes draw other numbers in each, and on each rank."""
        start = self._source.start, self._deal.rank
        return random.Random(f"{torch.initial_seed()} {self.epoch} {start}").getrandbits(63)

    def _kind(self) -> dict[str, int]:
        if isinstance(self._source, _Dealt):
            return {}
        curriculum = self._source.curriculum
        return {
            "num_samples": self._source.num_samples,
            "seed": self._source.seed,
            "shuffle": int(self._source.shuffle),
            "curriculum": curriculum.samples_per_step if curriculum is not None else 0,
        }


class RepeatingLoader:
    """`loader` without an end: when a pass is over, the next one begins."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        for _ in range(2):
            try:
                return next(self._batches)
            except StopIteration:
                self._batches = iter(self.loader)
        raise UsageError("RepeatingLoader: the loader has no batches")


def make_loader(
    dataset: Any,  # a torch Dataset, map-style or iterable
    *,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    drop_last: bool,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    curriculum: Curriculum | None = None,
) -> Loader:
    """A loader of this rank's micro-batches of `dataset`, prefetched by `num_workers` processes, pinned for a GPU.

    Iterable datasets are read whole by every rank, in their own order, by one process. Raises UsageError where
    there is not one micro-batch for each rank.
    """
    deal = Deal(micro_batch=micro_batch, rank=rank, num_ranks=num_ranks, drop_last=drop_last)
    pin = torch.cuda.is_available()
    own = torch.Generator()  # torch's loader draws a number at the start of each pass: not from the training's
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        if curriculum is not None or num_workers:
            raise UsageError("training_data is iterable: a curriculum and worker processes need a map-style dataset")
        dealt = _Dealt(dataset, deal)
        stream: DataLoader[Any] = DataLoader(
            dealt, batch_size=micro_batch, collate_fn=collate_fn, pin_memory=pin, generator=own
        )
        return Loader(dealt, stream, deal)
    sampler = MicroBatchSampler(len(dataset), deal, seed=seed, shuffle=shuffle, curriculum=curriculum)
    if not len(sampler):
        why = "is empty" if not len(dataset) else "is dropped as a last batch that is not full"
        raise UsageError(
            f"training_data of {len(dataset)} samples {why}: a step needs {micro_batch} of them on each of "
            f"{num_ranks} ranks"
        )
    batches: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        pin_memory=pin,
        num_workers=num_workers,
        generator=own,
    )
    return Loader(sampler, batches, deal)
