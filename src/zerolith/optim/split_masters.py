"""fp32 masters that rest as 16 bits beside the bf16 weights, and are fp32 only while a section is stepped.

[Note: ties] What a cast makes of a master and what is left of it would need 17 bits for one number in 131,072: those
that lie midway between two weights and go to the even one (see zerolith.kernels, [Note: split]). These are kept whole,
beside the others. So are those whose weights are not the masters rounded: a checkpoint's, before they are published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from zerolith import kernels
from zerolith.kernels import SplitMaster
from zerolith.section import Section


@dataclass(eq=False)
class Remainder:
    """What one section's masters are beside its weights; empty until it is written to."""

    nbytes: int  # of the masters
    version: int = 0  # how often it was written to
    stream: torch.cuda.Stream | None = None  # on which the following were made
    bits: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int16))  # one for each
    odd: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int64))  # places of those kept whole
    whole: Tensor = field(default_factory=partial(torch.empty, 0))  # fp32, their values

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self.bits, self.odd, self.whole


class Done:
    """It is done when it is asked for."""

    seconds: float | None = 0.0

    def wait(self) -> None:
        """Nothing."""


class SplitMasters:
    """Owner of the remainders of sections that `can_split`. A Store; see zerolith.memory.Residency.

    What is read is the masters, if weights have only changed to what was published of them. Where a weight has been
    edited, it is within half a unit in the weight's last place.
    """

    place = "as remainders of the weights"

    def __init__(self, sections: Iterable[Section]) -> None:
        self._sections = {_masters(section)._cdata: section for section in sections}
        self._regions: dict[int, Remainder] = {}  # by the masters' storage, as the sections

    def take(self, section: Section) -> None:
        """One more section, which `can_split`."""
        self._sections[_masters(section)._cdata] = section

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for region in self._regions.values() for each in region.tensors())

    def of(self, section: Section) -> Remainder:
        """What is kept of a section."""
        return self._regions[_masters(section)._cdata]

    def add(self, nbytes: int) -> Remainder:
        """A new region."""
        return Remainder(nbytes)

    def write(self, region: Remainder, storage: torch.UntypedStorage) -> Done:
        """Keep of the masters in `storage` what the weights lack."""
        masters, weights = self._of(storage)
        self._regions[storage._cdata] = region
        region.version += 1
        if masters.is_cuda:
            stream = torch.cuda.current_stream(masters.device)
            if region.stream not in (None, stream):  # what goes now may be read here, and used again there at once
                stream.synchronize()
            region.stream = stream
        rounded, region.bits = kernels.split(masters)
        region.odd = (rounded.view(torch.int16) != weights.view(torch.int16)).nonzero().view(-1)
        region.whole = masters[region.odd]
        return Done()

    def read(self, region: Remainder, storage: torch.UntypedStorage) -> Done:
        """Fill `storage` with the masters."""
        masters, weights = self._of(storage)
        kernels.join(SplitMaster(weights, region.bits), out=masters)
        masters[region.odd] = region.whole
        if self._sections[storage._cdata].edited():  # what was joined with an edited weight may be anything
            is_near = masters.bfloat16().view(torch.int16) == weights.view(torch.int16)
            masters.copy_(torch.where(is_near, masters, weights.float()))
        return Done()

    def close(self) -> None:
        """Let all of them go."""
        self._regions.clear()
        self._sections.clear()

    def _of(self, storage: torch.UntypedStorage) -> tuple[Tensor, Tensor]:
        masters = torch.empty(0, dtype=torch.float32, device=storage.device).set_(storage)
        section = self._sections[storage._cdata]
        assert section.main is not None, "see can_split"
        is_alike = section.weights.placement is section.main.placement
        return masters, (section.weights if is_alike else section.weights.own()).data


def _masters(section: Section) -> torch.UntypedStorage:
    assert section.main is not None, "see can_split"
    return section.main.data.untyped_storage()


def can_split(section: Section) -> bool:
    """Whether the masters are fp32 and their bf16 weights are beside them."""
    return section.master_device is None and could_split(section)


def could_split(section: Section) -> bool:
    """Whether the masters would be so if they were not offloaded."""
    if section.main is None or section.is_elsewhere:
        return False
    return (section.main.data.dtype, section.weights.data.dtype) == (torch.float32, torch.bfloat16)
