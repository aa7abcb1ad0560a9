"""A checkpoint's weights for plain PyTorch: as a state dict, or straight into a module's own memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerolith.checkpoint.catalog import open_checkpoint
from zerolith.checkpoint.content import Part
from zerolith.checkpoint.mismatch import refuse_mismatch
from zerolith.checkpoint.reader import Reader
from zerolith.checkpoint.stored import Stored, extra_states, left_out, stored_tensors, warn_of_left_out
from zerolith.errors import UsageError
from zerolith.layout import Range, boxes
from zerolith.parameter import ShardedParameter
from zerolith.zero.owners import owner_of

EXTRA = "_extra_state"  # torch's ending of the key of a module's own values in a state dict

_Named = tuple[tuple[str, ...], Tensor]  # a tensor and all its names in a model


class Fit(NamedTuple):
    """How a checkpoint and a model have met."""

    missing: list[str]  # in the checkpoint: the model keeps its own values
    unexpected: list[str]  # in the checkpoint, and not in the model


def get_fp32_state_dict(
    folder: Path | str, tag: str | None = None, *, exclude_frozen_parameters: bool = False
) -> dict[str, Any]:
    """The model's state dict on the CPU in fp32, from the master weights; for `model.load_state_dict`.

    `folder` is that of the job, or the checkpoint's own; without a tag it is the checkpoint that `latest` names.
    Tensors that are not floating are as they were; tied names share one tensor. Does not communicate. Raises
    CheckpointError.
    """
    with open_checkpoint(folder, tag) as reader:
        warn_of_left_out(reader, "and the state dict lacks them")
        state: dict[str, Any] = {}
        for stored in stored_tensors(reader.manifest, exclude_frozen=exclude_frozen_parameters):
            whole = torch.empty(stored.shape, dtype=stored.as_floating(torch.float32))
            _fill(reader, stored, whole)
            state |= dict.fromkeys(stored.names, whole)
        for path, value in extra_states(reader).items():
            state[_extra_key(path)] = value
        return state


def load_model(model: nn.Module, folder: Path | str, tag: str | None = None, *, strict: bool = True) -> Fit:
    """Copy a checkpoint's values into the parameters and persistent buffers of a plain module, cast to their dtypes.

    Takes 16 MiB beside the model; its tensors may be on any device. `folder` and `tag` are as for
    `get_fp32_state_dict`. Frozen parameters that saving left out stay as they are. Raises CheckpointError, with every
    name and shape that is wrong, before anything has been changed, and CheckpointDamagedError when some values have.
    """
    ours = _named_tensors(model)
    for names, tensor in ours:
        _check_plain(names[0], tensor)
    with open_checkpoint(folder, tag) as reader:
        extra = extra_states(reader)
        pairs, fit = _match(ours, _with_extra_state(model), reader, extra, strict=strict)
        warn_of_left_out(reader, "and the model keeps its own")
        with torch.no_grad():
            for tensor, stored in pairs:
                _fill(reader, stored, tensor.detach())
    for path, value in extra.items():
        if path in _with_extra_state(model):
            model.get_submodule(path).set_extra_state(value)
    return fit


def _match(
    ours: list[_Named], paths: set[str], reader: Reader, extra: dict[str, Any], *, strict: bool
) -> tuple[list[tuple[Tensor, Stored]], Fit]:
    """Which tensor takes which values. Raises CheckpointError if the checkpoint is not of this model."""
    theirs = stored_tensors(reader.manifest)
    by_name = {name: stored for stored in theirs for name in stored.names}
    absent = left_out(reader.manifest)
    pairs, missing, shapes, used = [], [], [], set()
    for names, tensor in ours:
        stored = next((by_name[name] for name in names if name in by_name), None)
        if stored is None:
            if tensor.numel() and not set(names) & set(absent):
                missing.append(names[0])
            continue
        used.add(stored.key)
        pairs.append((tensor, stored))
        if stored.shape != tensor.shape:
            shapes.append((names[0], stored.shape, tuple(tensor.shape)))
    known = {name for names, _ in ours for name in names}
    unexpected = [stored.names[0] for stored in theirs if stored.key not in used]
    unexpected += [name for name in absent if name not in known]
    missing += [_extra_key(path) for path in sorted(paths - extra.keys())]
    unexpected += [_extra_key(path) for path in sorted(extra.keys() - paths)]
    refuse_mismatch(shapes, missing, unexpected, strict=strict, hint="strict=False")
    return pairs, Fit(missing, unexpected)


def _named_tensors(model: nn.Module) -> list[_Named]:
    """Parameters and persistent buffers, each once, with all their names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return [(tuple(names[key]), tensor) for key, tensor in tensors.items()]


def _check_plain(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, ShardedParameter) or owner_of(tensor) is not None:
        raise UsageError(f"{name!r} belongs to an engine, which keeps more than weights; call engine.load_checkpoint()")
    if tensor.is_meta:
        raise UsageError(f"{name!r} is on the meta device and has no memory; call model.to_empty(device=...) before")


def _with_extra_state(model: nn.Module) -> set[str]:
    default = nn.Module.get_extra_state
    return {path for path, each in model.named_modules() if type(each).get_extra_state is not default}


def _extra_key(path: str) -> str:
    return f"{path}.{EXTRA}" if path else EXTRA


def _fill(reader: Reader, stored: Stored, tensor: Tensor) -> None:
    """Bring the checkpoint's values into a tensor of any dtype, on any device, however it lies in memory."""
    if not stored.numel:
        return
    if tensor.is_contiguous():
        reader.fill([Part.whole(stored.key, tensor)])
        return
    start = 0
    for block in reader.blocks(stored.key):
        for box in boxes(stored.shape, Range(start, start + block.numel())):
            where = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
            values = block[box.start - start :][: math.prod(box.sizes)]
            tensor[where].copy_(values.view(box.sizes))
        start += block.numel()
