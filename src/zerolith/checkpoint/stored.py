"""The tensors of a model as a checkpoint holds them: by which names, of which shape, and where their values are."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch

from zerolith.checkpoint.manifest import DTYPES, Manifest
from zerolith.checkpoint.reader import Reader
from zerolith.checkpoint.values import from_json
from zerolith.errors import CheckpointError

logger = logging.getLogger("zerolith")

SHOWN = 5  # names in a message


class Stored(NamedTuple):
    """A parameter, or a persistent buffer as rank 0 had it."""

    names: tuple[str, ...]  # in the model; the first is the one that the checkpoint uses
    key: str  # of the tensor in the checkpoint; one without elements has none there
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the files

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def as_floating(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype` for a tensor of floating numbers, and else its own."""
        return dtype if self.dtype.is_floating_point else self.dtype


def stored_tensors(manifest: Manifest, *, exclude_frozen: bool = False) -> list[Stored]:
    """Parameters in the model's order, and then buffers. What saving has left out is not among them.

    Raises CheckpointError if frozen ones are to be excluded and the checkpoint does not tell which those are.
    """
    if exclude_frozen and manifest.state.get("optimizer") is None:
        raise CheckpointError("this checkpoint has no optimizer, and so does not tell which parameters were frozen")
    found = []
    for name, record in manifest.parameters.items():
        key, shape = f"value/{name}", tuple(record.shape)
        tensor = manifest.tensors.get(key)
        if (tensor is None and math.prod(shape) > 0) or (exclude_frozen and not record.trained):
            continue
        dtype = DTYPES[tensor.dtype if tensor is not None else record.dtype]
        found.append(Stored((name, *record.aliases), key, shape, dtype))
    for key, tensor in manifest.tensors.items():
        kind, _, name = key.partition("/")
        if kind == "buffer":
            found.append(Stored((name,), key, tuple(tensor.shape), DTYPES[tensor.dtype]))
    return found


def left_out(manifest: Manifest) -> list[str]:
    """Frozen parameters that saving was told to leave out."""
    return [
        name
        for name, record in manifest.parameters.items()
        if f"value/{name}" not in manifest.tensors and math.prod(record.shape) > 0
    ]


def warn_of_left_out(reader: Reader, consequence: str) -> None:
    """Say, if saving has left out frozen parameters, which and what that means."""
    names = left_out(reader.manifest)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        first = ", ".join(names[:SHOWN])
        logger.warning("%s was saved without frozen parameters, %s: %s%s", reader.folder, consequence, first, more)


def extra_states(reader: Reader) -> dict[str, Any]:
    """What modules keep beside tensors, by the module's path. Raises CheckpointDamagedError."""
    return dict(from_json(reader.manifest.state.get("extra_state") or {}, tensor=reader.tensor))
