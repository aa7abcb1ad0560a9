"""Micro-batches for each rank, the same ones whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from zerolith.errors import UsageError


class MicroBatchSampler(Sampler[list[int]]):
    """Index lists of one rank, which has the micro-batches k with k % ranks == rank.

    Micro-batch k of an epoch holds the same samples at every world size. Each epoch is shuffled anew from `seed`
    and the epoch's number. All ranks get the same number of micro-batches: what does not fill one for every rank
    is dropped (drop_last) or filled up from the epoch's start.
    """

    def __init__(
        self, num_samples: int, *, micro_batch: int, rank: int, num_ranks: int, drop_last: bool, seed: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.micro_batch = micro_batch
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.epoch = 0
        per_round = micro_batch * num_ranks
        self.num_batches = num_samples // per_round if drop_last else -(-num_samples // per_round)  # of each rank

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        self.epoch += 1
        for batch in range(self.rank, self.num_batches * self.num_ranks, self.num_ranks):
            positions = torch.arange(batch * self.micro_batch, (batch + 1) * self.micro_batch)
            yield order[positions % self.num_samples].tolist()


def make_loader(
    dataset: Any,  # a torch Dataset, map-style
    *,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    drop_last: bool,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> DataLoader[Any] | None:
    """A loader of this rank's micro-batches of `dataset`; None for None."""
    if dataset is None:
        return None
    if not hasattr(dataset, "__len__"):
        raise UsageError(
            f"training_data is a {type(dataset).__name__} without a length, so it cannot be dealt out to ranks; "
            "pass a map-style dataset, or make a loader of your own"
        )
    sampler = MicroBatchSampler(
        len(dataset), micro_batch=micro_batch, rank=rank, num_ranks=num_ranks, drop_last=drop_last
    )
    if not len(sampler):
        why = "is empty" if not len(dataset) else "is dropped as a last batch that is not full"
        raise UsageError(
            f"training_data of {len(dataset)} samples {why}: a step needs {micro_batch} of them on each of "
            f"{num_ranks} ranks"
        )
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, pin_memory=torch.cuda.is_available())
