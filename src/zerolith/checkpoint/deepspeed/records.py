"""What a pickle turns into here: plain values, and inert records of all that would have been code.

A record can be looked into; it is never an instance of what the file names, and nothing named is looked up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.archive import Archive, Record
from zerolith.checkpoint.disk import bytes_of
from zerolith.errors import CheckpointDamagedError
from zerolith.layout import Range

SMALL_BYTES = 2**20  # an expanded tensor, whose elements share memory, may always get so large
MAX_DIMS = 64  # torch's own limit


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of something in a module."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Unknown:
    """What a call would have made: `callee(*args, **kwargs)`, then given `state`, entries and elements."""

    callee: Any  # a Symbol, or the Unknown that an earlier call would have made
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None  # for __setstate__, or the attributes
    entries: dict[Any, Any] = field(default_factory=dict)  # of a mapping
    elements: list[Any] = field(default_factory=list)  # of a sequence or a set


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes in a file that tensors share."""

    archive: Archive = field(repr=False)
    record: Record
    dtype: torch.dtype | None  # None: its tensors say
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that is still in its file; made by `stored`, which has checked it."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def spec(self) -> tuple[Any, ...]:
        """Equal for tensors of one file that are the same."""
        return self.storage.record.name, self.dtype, self.offset, self.shape, self.stride

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def load(self) -> Tensor:
        """The tensor, in memory of its own. Raises CheckpointError."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        data = torch.empty(span, dtype=self.dtype)
        self._read(data, self.offset)
        if self.contiguous:
            return data.view(self.shape)
        steps = [stride if size > 1 else 1 for size, stride in zip(self.shape, self.stride, strict=True)]
        return data.as_strided(self.shape, steps).clone(memory_format=torch.contiguous_format)

    def read_into(self, target: Tensor, part: Range) -> None:
        """Fill `target`, (part.numel,), with elements of the flattened tensor. Raises CheckpointError."""
        if not self.contiguous or part.start < 0 or part.stop > self.numel:
            raise self.damaged(f"elements {part.start} to {part.stop} of it are asked for")
        if target.dtype != self.dtype:
            raise self.damaged(f"it is {self.dtype}, and not {target.dtype} like its neighbours")
        if part.numel:
            self._read(target, self.offset + part.start)

    def damaged(self, what: str) -> CheckpointDamagedError:
        where = self.storage
        return where.archive.damaged(where.record.name, f"a tensor {list(self.shape)} there: {what}")

    def _read(self, target: Tensor, start: int) -> None:
        itemsize = target.element_size()
        self.storage.archive.read(self.storage.record, bytes_of(target), offset=start * itemsize)
        if target.dtype == torch.bool:  # bytes other than 0 and 1 are no bools
            target.copy_(target.view(torch.uint8) != 0)


def stored(storage: Storage, dtype: torch.dtype, *, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """A tensor of these sizes in `storage`. Raises CheckpointDamagedError if it reaches outside."""
    damage = storage.archive.damaged(storage.record.name, "a tensor there has sizes that cannot be")
    numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (-1,)
    if not all(type(number) is int and 0 <= number <= sys.maxsize for number in numbers):
        raise damage
    if len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise damage
    numel = math.prod(shape)
    if math.prod(size for size in shape if size) > sys.maxsize // dtype.itemsize:
        raise damage
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel and (offset + last + 1) * dtype.itemsize > storage.nbytes:
        raise storage.archive.damaged(
            storage.record.name, f"a tensor there ends at element {offset + last + 1}, after {storage.nbytes} bytes"
        )
    if numel * dtype.itemsize > max(storage.nbytes, SMALL_BYTES):
        raise damage
    return StoredTensor(storage=storage, dtype=dtype, offset=offset, shape=shape, stride=stride)


def brief(value: Any) -> str:
    """A few words on any value, for messages."""
    if value is None or isinstance(value, bool | float | Symbol):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 100 else "a huge number"
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def children(value: Any) -> list[Any]:
    """What a value holds directly."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Unknown):
        return [value.callee, value.args, value.kwargs, value.state, value.entries, value.elements]
    return []
