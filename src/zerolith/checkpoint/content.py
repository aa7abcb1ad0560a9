"""What a rank puts into a checkpoint, and where it wants things of a checkpoint to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zerolith.layout import Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Elements of a flattened logical tensor, and this rank's memory of them.

    data: (range.numel,), contiguous, on any device, in the dtype of memory, which need not be that of the file.
    make: gives the data when its turn to be written comes; `data` is on the meta device then, and tells the dtype.
    """

    name: str  # of the logical tensor
    shape: tuple[int, ...]  # of the whole of it
    range: Range
    data: Tensor
    make: Callable[[], Tensor] | None = None

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Part:
        flat = tensor.detach().reshape(-1)
        return cls(name=name, shape=tuple(tensor.shape), range=Range(0, tensor.numel()), data=flat)


@dataclass(kw_only=True)
class Content:
    """One rank's share of a checkpoint. Parts of different ranks do not overlap."""

    parts: list[Part] = field(default_factory=list)
    # JSON: by parameter, what ParameterRecord.optimizer holds; each parameter from one rank only
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    rank_state: Any = None  # JSON: what belongs to this rank alone
    close: Callable[[], None] = lambda: None  # to be called when all parts have been read

    def add_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.parts += [Part.whole(name, tensor) for name, tensor in tensors.items()]
