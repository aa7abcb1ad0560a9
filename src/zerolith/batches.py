"""What an engine is fed: batch sizes that may change, loaders, and ranks that have fewer batches than others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zerolith.config import Config
from zerolith.data import Loader, make_loader
from zerolith.errors import UsageError
from zerolith.micro_steps import MicroSteps
from zerolith.precision import LossScaler
from zerolith.status import Status


def terms_of_a_sum(config: Config, micro: MicroSteps, scaler: LossScaler, *, ranks: int) -> Callable[[], float]:
    """What a step's sum of gradients is divided by, loss scale included.

    Not a method of an engine: who has one would keep a dropped engine alive.
    """
    of_ranks = (1 if config.gradient_allreduce_op == "sum" else ranks) / config.gradient_predivide_factor
    return lambda: of_ranks * micro.per_step * scaler.scale


class Batches(Status):
    """The part of an engine that decides how much data a step takes and where it comes from."""

    _weight = 1.0  # of this rank's next losses: what `join` makes of ranks that have run out

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per optimizer step by changing the number of micro-batches; the same on every rank.

        Raises UsageError if it is no multiple of micro-batch times ranks, or in the middle of an accumulation.
        """
        piece = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size < 1 or train_batch_size % piece:
            raise UsageError(
                f"set_train_batch_size({train_batch_size}): it must be a multiple of {piece}, the micro-batch times "
                f"{self.dp_world_size} ranks"
            )
        self._resize(train_batch_size, self.train_micro_batch_size_per_gpu())

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples per rank and micro-batch; the number of micro-batches stays. Loaders are not changed."""
        if micro_batch_size < 1:
            raise UsageError(f"set_train_micro_batch_size({micro_batch_size}): it must be at least 1")
        piece = self.gradient_accumulation_steps() * self.dp_world_size
        self._resize(micro_batch_size * piece, micro_batch_size)

    def _resize(self, total: int, micro: int) -> None:
        steps = total // (micro * self.dp_world_size)
        self._micro.count_anew(steps)
        sizes = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro}
        self._settings = self._settings.model_copy(update={**sizes, "gradient_accumulation_steps": steps})

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        **options: Any,
    ) -> Loader:
        """A loader of this rank's micro-batches of `dataset`, such as one to validate with.

        By default in the configured micro-batch size. `options` are those of zerolith.data.make_loader: drop_last,
        seed, shuffle, curriculum.
        """
        return make_loader(
            dataset,
            micro_batch=batch_size or self.train_micro_batch_size_per_gpu(),
            rank=self.global_rank,
            num_ranks=self.world_size,
            collate_fn=collate_fn,
            num_workers=num_local_io_workers or 0,
            **{"drop_last": self._settings.dataloader_drop_last, **options},
        )

    def join(self, loader: Iterable[Any]) -> Iterator[Any]:
        """This rank's batches, until every rank has run out of its own.

        A rank that runs out gets its last batch again, and its losses count for nothing: it takes part in all that is
        collective. Gradients are averaged over the ranks that still have data, so that each batch weighs what its
        fellows of that moment weigh. Every rank iterates it, and runs each batch through the engine and its
        `backward`. Raises UsageError on every rank if one has no batch at all.
        """
        batches, last, comm = iter(loader), None, self._sharded.comm
        nothing = object()
        is_first = True
        try:
            while True:
                batch = next(batches, nothing)
                num_active = comm.sum([float(batch is not nothing)], name="join")[0]
                if num_active == 0:
                    return
                if is_first and num_active < comm.size:
                    raise UsageError("join: a rank has no batch at all, so it has nothing to take part with")
                is_first = False
                self._weight = comm.size / num_active if batch is not nothing else 0.0
                last = batch if batch is not nothing else last
                yield last
        finally:
            self._weight = 1.0
