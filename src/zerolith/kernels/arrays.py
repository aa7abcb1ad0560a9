"""The tensors of a call, checked before anybody takes their addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zerolith.errors import UsageError
from zerolith.layout import BLOCK

FORMATS = (torch.float32, torch.bfloat16, torch.float16)  # of gradients and of weights that are written out
CHUNK = 256 * BLOCK  # elements that a thread takes at a time


class SplitMaster(NamedTuple):
    """Master weights of 4 bytes each, the upper half of which serves as the bf16 weights. See [Note: split]."""

    weight: Tensor  # bf16
    remainder: Tensor  # int16, same shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """What an update reads and writes. All contiguous, on one device, of one number of elements, not overlapping."""

    master: Tensor  # fp32, or the bf16 weights of a split one
    remainder: Tensor | None = None  # int16
    states: tuple[Tensor, ...]  # fp32
    grad: Tensor  # one of FORMATS
    out: Tensor | None = None  # one of FORMATS

    @classmethod
    def checked(
        cls, master: Tensor | SplitMaster, states: Mapping[str, Tensor], grad: Tensor, out: Tensor | None
    ) -> Arrays:
        """Raises UsageError where an array is not as above."""
        named: dict[str, tuple[Tensor, tuple[torch.dtype, ...]]] = {}
        if isinstance(master, SplitMaster):
            if out is not None:
                raise UsageError("out: a split master is its own bf16 weights; leave `out` away")
            named["master.weight"] = master.weight, (torch.bfloat16,)
            named["master.remainder"] = master.remainder, (torch.int16,)
            main, remainder = master
        else:
            named["master"] = master, (torch.float32,)
            main, remainder = master, None
        named |= {name: (state, (torch.float32,)) for name, state in states.items()}
        named["grad"] = grad, FORMATS
        if out is not None:
            named["out"] = out, FORMATS
        check(named)
        return cls(master=main, remainder=remainder, states=tuple(states.values()), grad=grad, out=out)

    @property
    def written(self) -> list[Tensor]:
        return [each for each in (self.master, self.remainder, *self.states, self.out) if each is not None]


def check(named: Mapping[str, tuple[Tensor, tuple[torch.dtype, ...]]]) -> None:
    """Each tensor has one of its dtypes, is contiguous and at hand; all are of one size and device, and apart."""
    first_name, (first, _) = next(iter(named.items()))
    for name, (tensor, dtypes) in named.items():
        _check_alone(name, tensor, dtypes)
        if tensor.device != first.device:
            raise UsageError(f"{name} is on {tensor.device}, {first_name} on {first.device}; move one of them")
        if tensor.numel() != first.numel():
            raise UsageError(f"{name} has {tensor.numel()} elements, {first_name} has {first.numel()}")
    spans = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, (tensor, _) in named.items() if tensor.numel())
    for (start, size, name), (following, _, other) in pairwise(spans):
        if start + size > following:
            raise UsageError(f"{name} and {other} overlap in memory; give each an array of its own")


def _check_alone(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise UsageError(f"{name} is {type(tensor).__name__}, not a tensor")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UsageError(f"{name} is {type(tensor).__name__}; pass a plain tensor, such as its local one")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UsageError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {allowed}")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise UsageError(f"{name} is not contiguous; pass a flat view of a whole buffer, or .contiguous()")
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < end:
        raise UsageError(f"{name} has no memory: its storage was released; gather it first")


def count_writes(tensors: Iterable[Tensor]) -> None:
    """Tell autograd, which sees no writes through addresses, as every in-place operation of torch does."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
