"""What an optimizer steps as one tensor, and how it is cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from zerolith.gradients import Gradients
from zerolith.layout import Range, merge_runs
from zerolith.member import Granularity

State = dict[str, Any]  # what an optimizer keeps for one tensor: tensors and anything else


@dataclass(eq=False)
class Piece:
    """A range of a section's master that the optimizer steps as one tensor."""

    gradients: Gradients
    range: Range  # of the section's layout; whole slots or parts of them, gaps included
    group: int
    param: nn.Parameter  # shape of the range, or of the slot where tensors are stepped whole

    def slots(self) -> list[int]:
        """The parameters of which this piece holds something."""
        layout = self.gradients.section.layout
        return [i for i, slot in enumerate(layout.slots) if slot.padded.clip(self.range).numel]

    def mixes(self, kinds: Sequence[int]) -> bool:
        """Whether its parameters are of different kinds; kinds: one for each of the section's."""
        return len({kinds[index] for index in self.slots()}) > 1

    def runs(self, kinds: Sequence[int]) -> Iterator[Range]:
        """The ranges of neighbouring parameters of one kind, in order."""
        slots = self.gradients.section.layout.slots
        for _, run in merge_runs((kinds[index], slots[index].padded.clip(self.range)) for index in self.slots()):
            yield run

    def part(self, run: Range) -> Piece:
        """Those of its elements that are in `run`, over the same memory."""
        return Piece(self.gradients, run, self.group, nn.Parameter(self.param.detach()[self._inside(run)]))

    def part_of_state(self, run: Range, state: State) -> Iterator[tuple[str, Any]]:
        """Copies of what an optimizer keeps for those elements, given what it keeps for all."""
        for name, value in state.items():
            is_cut = is_per_element(name, value, self.param.shape)
            yield name, value[self._inside(run)].clone() if is_cut else copy.deepcopy(value)

    def _inside(self, run: Range) -> slice:
        return slice(run.start - self.range.start, run.stop - self.range.start)


def cut(own: Gradients, whole: Mapping[int, nn.Parameter]) -> list[Piece]:
    """The pieces of a section: of each group where elements are stepped, else of each tensor.

    whole: by index, the tensors that this rank steps whole, where it holds masters of those alone.
    """
    main, layout = own.section.main, own.section.layout
    if main is not None and own.section.granularity is Granularity.ELEMENT:
        ranges = [(group, run.clip(main.range)) for group, run in layout.group_ranges()]
        return [Piece(own, run, group, nn.Parameter(main.at(run))) for group, run in ranges if run.numel]
    if main is not None:
        whole = {index: nn.Parameter(main.slot(index)) for index in range(len(layout.slots))}
    return [Piece(own, layout.slots[index].span, layout.slots[index].group, whole[index]) for index in whole]


def is_per_element(name: str, value: object, shape: torch.Size) -> TypeGuard[Tensor]:
    """Whether the state `name` of a tensor of `shape` has a number for each of its elements."""
    return isinstance(value, Tensor) and value.shape == shape and (value.dim() > 0 or name != "step")
