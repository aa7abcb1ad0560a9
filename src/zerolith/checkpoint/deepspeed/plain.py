"""From the values of a file to those of a client: tensors in memory, options as JSON. All of them are trees by now."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.records import StoredTensor, Symbol, Unknown, brief
from zerolith.errors import CheckpointDamagedError

LIMIT_FACTOR = 4  # views that overlap may take so many times what their storages take
NUMBERS = (bool, int, float)
BY_NAME = Symbol("builtins", "getattr")  # what Python 3.11.0 to 3.11.3 call with an enum and the name of a member
STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}  # DeepSpeed's, by name


def load_tensors(value: Any, *, where: Path) -> Any:
    """`value` with every StoredTensor in memory, the same one where it was the same. Unknowns stay as they are.

    Raises CheckpointDamagedError if the tensors together are many times larger than their storages.
    """
    return _Loader(where).load(value)


class _Loader:
    where: Path
    loaded: dict[Any, Tensor]
    storages: dict[str, int]
    nbytes: int

    def __init__(self, where: Path) -> None:
        self.where, self.loaded, self.storages, self.nbytes = where, {}, {}, 0

    def load(self, value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return self.tensor(value)
        if isinstance(value, OrderedDict):
            return OrderedDict((self.load(key), self.load(each)) for key, each in value.items())
        if isinstance(value, dict):
            return {self.load(key): self.load(each) for key, each in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(self.load(each) for each in value)
        return value

    def tensor(self, value: StoredTensor) -> Tensor:
        known = self.loaded.get(value.spec)
        if known is not None:
            return known
        self.storages[value.storage.record.name] = value.storage.nbytes
        self.nbytes += value.numel * value.dtype.itemsize
        if self.nbytes > LIMIT_FACTOR * sum(self.storages.values()) + 2**20:
            raise CheckpointDamagedError(f"{self.where}: its tensors are many times larger than what it holds of them")
        return self.loaded.setdefault(value.spec, value.load())


def as_json(value: Any) -> Any:
    """`value` as JSON has it: tuples are lists, keys text, a tensor of one element its number, an enum what it stands
    for; any other object is the text `<its class>`."""
    if value is None or isinstance(value, (*NUMBERS, str)):
        return value
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(as_json(key)): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(each) for each in value]
    if isinstance(value, StoredTensor):
        only = value.numel == 1 and not value.dtype.is_complex
        return value.load().item() if only else f"<tensor {list(value.shape)}>"
    if isinstance(value, Unknown):
        return as_json(meaning(value)) if meaning(value) is not value else f"<{_class_of(value)}>"
    return str(value) if isinstance(value, Symbol | torch.dtype) else f"<{type(value).__name__}>"


def meaning(value: Any) -> Any:
    """The number or text that an enum's member stands for, or its name; anything else as it is."""
    if not isinstance(value, Unknown):
        return value
    if len(value.args) == 1 and isinstance(value.args[0], (*NUMBERS, str)):
        return value.args[0]
    if value.callee == BY_NAME and len(value.args) == 2 and isinstance(value.args[0], Symbol):
        kind, name = value.args
        return STAGES.get(name, name) if kind.name == "ZeroStageEnum" and isinstance(name, str) else name
    return value


def number(value: Any) -> float | None:
    """The number that a plain one, or a tensor without dimensions, is; None for anything else."""
    if isinstance(value, NUMBERS):
        return float(value) if isinstance(value, float) or value.bit_length() < 1000 else None
    if isinstance(value, StoredTensor) and not value.shape and not value.dtype.is_complex:
        return float(value.load().item())
    return None


def _class_of(value: Unknown) -> str:
    callee = value.callee
    while isinstance(callee, Unknown):
        callee = callee.callee
    return brief(callee)
