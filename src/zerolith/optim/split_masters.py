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
    bits: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int16))  # one for each
    odd: Tensor = field(default_factory=partial(torch.empty, 0, dtype=torch.int64))  # places of those kept whole
    whole: Tensor = field(default_factory=partial(torch.empty, 0))  # fp32, their values

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self.bits, self.odd, self.whole


class Done:
    """It is done when it is asked for."""

    def wait(self) -> None:
        """Nothing."""


class SplitMasters:
    """Owner of the remainders of sections that `can_split`. A Store; see zerolith.memory.Residency.

    What is read is the masters, if weights have only changed to what was published of them. Where a weight has been
    edited, it is within half a unit in the weight's last place.
    """

    place = "as remainders of the weights"

    def __init__(self, sections: Iterable[Section]) -> None:
        self._regions: list[Remainder] = []
        self._weights = dict(map(_pair, sections))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for region in self._regions for each in region.tensors())

    def add(self, nbytes: int) -> Remainder:
        """A new region."""
        self._regions.append(Remainder(nbytes))
        return self._regions[-1]

    def write(self, region: Remainder, storage: torch.UntypedStorage) -> Done:
        """Keep of the masters in `storage` what the weights lack."""
        masters, weights = self._of(storage)
        rounded, region.bits = kernels.split(masters)
        region.odd = (rounded.view(torch.int16) != weights.view(torch.int16)).nonzero().view(-1)
        region.whole = masters[region.odd]
        return Done()

    def read(self, region: Remainder, storage: torch.UntypedStorage) -> Done:
        """Fill `storage` with the masters."""
        masters, weights = self._of(storage)
        kernels.join(SplitMaster(weights, region.bits), out=masters)
        masters[region.odd] = region.whole
        return Done()

    def close(self) -> None:
        """Let all of them go."""
        self._regions.clear()
        self._weights.clear()

    def _of(self, storage: torch.UntypedStorage) -> tuple[Tensor, Tensor]:
        masters = torch.empty(0, dtype=torch.float32, device=storage.device).set_(storage)
        return masters, self._weights[storage._cdata]


def _pair(section: Section) -> tuple[int, Tensor]:
    """Whose masters they are, by their storage, and the weights beside them."""
    assert section.main is not None, "see can_split"
    weights = section.weights if section.weights.placement is section.main.placement else section.weights.own()
    return section.main.data.untyped_storage()._cdata, weights.data


def can_split(section: Section) -> bool:
    """Whether the masters are fp32 and their bf16 weights are beside them."""
    main, weights = section.main, section.weights.data
    if main is None or section.is_elsewhere:
        return False
    dtypes = (main.data.dtype, weights.dtype)
    return dtypes == (torch.float32, torch.bfloat16) and main.data.device == weights.device
