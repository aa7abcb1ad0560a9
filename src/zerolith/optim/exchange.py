"""Whole tensors for optimizers that need them: each is stepped by its owner rank, which holds its master.

At the step, shards of the gradient go to the owners by one all-to-all per section, and the new values come back
by another. No rank ever holds more than the tensors that it owns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm
from zerolith.layout import Range
from zerolith.section import Section


class WholeTensors:
    """The tensors of one section by owner; `params[index]` exist on their owner only, in the master dtype."""

    def __init__(self, section: Section, comm: Comm) -> None:
        self.section = section
        self.comm = comm
        self.params = {index: nn.Parameter(master) for index, master in section.masters.items()}
        ranks = range(comm.size)
        indices = range(len(section.members))
        # (slot, part of it in elements from its head), by the other rank, in an order that both ends know.
        self.sent = [self._parts(comm.rank, [i for i in indices if section.owners[i] == owner]) for owner in ranks]
        mine = [i for i in indices if section.owners[i] == comm.rank]
        self.received = [self._parts(source, mine) for source in ranks]

    def take_grads(self, shard: FlatBuffer) -> dict[int, Tensor]:
        """From every rank's shard of the gradients to the owners' whole ones, by slot. Collective."""
        inbox = shard.data.new_empty(_numel(self.received))
        outbox = torch.cat([self._at(shard, *part) for parts in self.sent for part in parts] or [inbox[:0]])
        self.comm.all_to_all(inbox, outbox, *self._splits(), name=f"{self.section.name}.grad")
        whole = {index: shard.data.new_empty(param.numel()) for index, param in self.params.items()}
        cursor = 0
        for index, part in (part for parts in self.received for part in parts):
            whole[index][part.start : part.stop] = inbox[cursor : cursor + part.numel]
            cursor += part.numel
        return {index: grad.view_as(self.params[index]) for index, grad in whole.items()}

    def put_values(self, shard: FlatBuffer) -> None:
        """From the owners' masters to every rank's shard of the weights, in the weights' dtype. Collective."""
        flats = {index: param.detach().to(shard.data.dtype).view(-1) for index, param in self.params.items()}
        inbox = shard.data.new_empty(_numel(self.sent))
        parts = [flats[index][part.start : part.stop] for parts in self.received for index, part in parts]
        received, sent = self._splits()
        self.comm.all_to_all(inbox, torch.cat(parts or [inbox[:0]]), sent, received, name=self.section.name)
        cursor = 0
        for index, part in (part for parts in self.sent for part in parts):
            self._at(shard, index, part).copy_(inbox[cursor : cursor + part.numel])
            cursor += part.numel

    def _parts(self, holder: int, indices: list[int]) -> list[tuple[int, Range]]:
        owned = [(index, self.section.layout.owned(index, holder)) for index in indices]
        return [(index, part) for index, part in owned if part.numel]

    def _at(self, shard: FlatBuffer, index: int, part: Range) -> Tensor:
        return shard.at(part.shift(self.section.layout.slots[index].start))

    def _splits(self) -> tuple[list[int], list[int]]:
        return [_numel([parts]) for parts in self.received], [_numel([parts]) for parts in self.sent]


def _numel(parts: list[list[tuple[int, Range]]]) -> int:
    return sum(part.numel for own in parts for _, part in own)
