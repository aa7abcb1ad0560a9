"""The weights of a sharded model, whole, on rank 0: as one safetensors file or as a state dict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from zerolith.checkpoint.disk import Disk, bytes_of
from zerolith.checkpoint.folder import make_folder
from zerolith.checkpoint.shard_file import safetensors_header
from zerolith.checkpoint.training_state import Sharded, persistent_buffers
from zerolith.comm import agree
from zerolith.errors import CheckpointError, UsageError


def save_weights(sharded: Sharded, disk: Disk, path: Path, *, exclude_frozen: bool) -> None:
    """Write weights and persistent buffers to the safetensors file `path`. Collective; rank 0 writes.

    Raises CheckpointError on every rank; what was at `path` before is still there then.
    """
    comm, error = sharded.model.comm, None
    try:
        if comm.rank == 0:
            make_folder(disk, path.parent)
    except OSError as caught:
        error = _failure(caught, path)
    agree(comm, error, doing="saving weights", kind=CheckpointError)
    names = [name for name, _ in _described(sharded, exclude_frozen)]
    temporary = path.with_name(f".{path.name}.new")
    file = -1
    for name, tensor in _whole(sharded):  # to its end on every rank, also when writing fails
        try:
            if comm.rank == 0 and error is None:
                if file < 0:
                    with suppress(FileNotFoundError):
                        disk.unlink(temporary)
                    file = disk.create(temporary)
                    disk.write(file, memoryview(_header(sharded, exclude_frozen)))
                if name in names:
                    held = tensor.cpu().contiguous()
                    disk.write(file, bytes_of(held))
        except Exception as caught:  # the other ranks must not wait for this one
            error = _failure(caught, path)
    try:
        if file >= 0:
            _finish(disk, file, temporary, path, failed=error is not None)
    except OSError as caught:
        error = error or _failure(caught, path)
    agree(comm, error, doing="saving weights", kind=CheckpointError)


def whole_state_dict(sharded: Sharded, *, exclude_frozen: bool) -> dict[str, Tensor] | None:
    """The model's state dict on the CPU of rank 0, tied names sharing a tensor; None elsewhere. Collective."""
    wanted = {name for name, _ in _described(sharded, exclude_frozen)}
    aliases = {name: record.aliases for name, record in sharded.parameters().items()}
    state: dict[str, Tensor] = {}
    error: Exception | None = None
    for name, tensor in _whole(sharded):  # to its end on every rank
        if sharded.rank == 0 and name in wanted and error is None:
            try:
                held = tensor.detach().to("cpu", copy=True)
                state |= {each: held for each in [name, *aliases.get(name, ())]}
            except Exception as caught:  # no memory, most likely
                error, state = caught, {}
    agree(sharded.model.comm, error, doing="gathering the state dict", kind=UsageError)
    return state if sharded.rank == 0 else None


def _failure(error: Exception, path: Path) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    failure = CheckpointError(f"{path}: weights cannot be saved ({reason})")
    failure.__cause__ = error
    return failure


def _finish(disk: Disk, file: int, temporary: Path, path: Path, *, failed: bool) -> None:
    try:
        if not failed:
            disk.sync(file)
    finally:
        os.close(file)
    if failed:
        disk.unlink(temporary)
        return
    disk.rename(temporary, path)
    disk.sync_dir(path.parent)


def _described(sharded: Sharded, exclude_frozen: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in the order of `_whole`; of a sharded one, what has its shape and dtype."""
    for section, _, index, member in sharded.slots():
        current = section.stand_ins[index] if section.is_sharded else member.param
        if current.requires_grad or member.trained or not exclude_frozen:
            yield member.name, member.param
    yield from persistent_buffers(sharded.model.model).items()


def _header(sharded: Sharded, exclude_frozen: bool) -> bytes:
    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _described(sharded, exclude_frozen)]
    return safetensors_header(described, {"format": "pt"})


@torch.no_grad()
def _whole(sharded: Sharded) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, whole, unit by unit, and then the buffers. Collective: every rank goes to the end."""
    sharded.model.release_all()
    for unit in sharded.model.units:
        unit.gather()
        for section in unit.sections:
            for member in section.members:
                yield member.name, member.param.detach()
        unit.release()
    yield from persistent_buffers(sharded.model.model).items()
