"""Whole tensors for optimizers that need them: each is stepped by its owner rank, which holds its master.

At the step, shards of the gradient go to the owners by one all-to-all per section, and the new values come back
by another. No rank ever holds more than the tensors that it owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm
from zerolith.layout import Range
from zerolith.section import Section

Views = list[list[Tensor]]  # flat parts of tensors, by the other rank, in an order that both ends know


class WholeTensors:
    """The tensors of one section by owner; `params[index]` exist on their owner only, in the master dtype."""

    def __init__(self, section: Section, comm: Comm) -> None:
        self.section = section
        self.comm = comm
        self.params = {index: nn.Parameter(master) for index, master in section.masters.items()}
        # (slot, part of it in elements from its head), by the other rank
        self.sent = [self._parts(holder=comm.rank, owner=owner) for owner in range(comm.size)]
        self.received = [self._parts(holder=source, owner=comm.rank) for source in range(comm.size)]

    def take_grads(self, shard: FlatBuffer) -> dict[int, Tensor]:
        """From every rank's shard of the gradients to the owners' whole ones, by slot. Collective."""
        whole = {index: shard.data.new_empty(param.shape) for index, param in self.params.items()}
        self._move(self._in_shard(shard), self._in_whole(whole), shard.data.dtype, name=f"{self.section.name}.grad")
        return whole

    def put_values(self, shard: FlatBuffer) -> None:
        """From the owners' masters to every rank's shard of the weights, in the weights' dtype. Collective."""
        device, dtype = shard.data.device, shard.data.dtype
        whole = {index: param.detach().to(device, dtype) for index, param in self.params.items()}
        self._move(self._in_whole(whole), self._in_shard(shard), shard.data.dtype, name=self.section.name)

    def _parts(self, *, holder: int, owner: int) -> list[tuple[int, Range]]:
        """What rank `holder` has in its shard of the tensors that rank `owner` steps."""
        layout, owners = self.section.layout, self.section.owners
        parts = [(index, layout.owned(index, holder)) for index, rank in enumerate(owners) if rank == owner]
        return [(index, part) for index, part in parts if part.numel]

    def _in_shard(self, shard: FlatBuffer) -> Views:
        slots = self.section.layout.slots
        return [[shard.at(part.shift(slots[index].start)) for index, part in parts] for parts in self.sent]

    def _in_whole(self, whole: Mapping[int, Tensor]) -> Views:
        return [[whole[index].view(-1)[part.start : part.stop] for index, part in parts] for parts in self.received]

    def _move(self, source: Views, target: Views, dtype: torch.dtype, *, name: str) -> None:
        """Copy what every rank has in `source` to the others' `target`, all of it in `dtype`. Collective."""
        in_splits, out_splits = ([sum(view.numel() for view in views) for views in each] for each in (source, target))
        received = list(chain(*target))
        # Also a rank that sends nothing sends it in the dtype of all.
        outbox = torch.cat([torch.empty(0, dtype=dtype, device=self.comm.device), *chain(*source)])
        inbox = outbox.new_empty(sum(out_splits))
        self.comm.all_to_all(inbox, outbox, out_splits, in_splits, name=name)
        for view, values in zip(received, inbox.split([view.numel() for view in received]), strict=True):
            view.copy_(values)
