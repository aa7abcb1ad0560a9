"""A checkpoint's weights as safetensors files of the kind that Hugging Face's libraries load."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.checkpoint.catalog import open_checkpoint
from zerolith.checkpoint.disk import Disk, bytes_of, write_file
from zerolith.checkpoint.folder import make_folder
from zerolith.checkpoint.progress import Meter, Tell
from zerolith.checkpoint.reader import Reader
from zerolith.checkpoint.shard_file import safetensors_header
from zerolith.checkpoint.stored import Stored, stored_tensors, warn_of_left_out
from zerolith.errors import CheckpointError, UsageError

logger = logging.getLogger("zerolith")

DTYPES: Mapping[str, torch.dtype | None] = {  # of floating tensors; None: as the checkpoint has them
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "saved": None,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
CAST_NUMEL = 2**19  # elements at a time
WEIGHTS = re.compile(r"model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors(\.index\.json)?(\.new)?")  # what an export writes


class Exported(NamedTuple):
    """A tensor on its way into a file."""

    stored: Stored
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.stored.names[0]

    @property
    def nbytes(self) -> int:
        return self.stored.numel * self.dtype.itemsize


def export(
    folder: Path | str,
    target: Path | str,
    tag: str | None = None,
    *,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    exclude_frozen_parameters: bool = False,
    overwrite: bool = False,
    tell: Tell | None = None,
) -> list[Path]:
    """Write parameters and persistent buffers into the folder `target`; returns the files, the index last.

    `folder` is that of the job, or the checkpoint's own. dtype: of floating tensors, "bf16", "fp16", "fp32" or, bit for
    bit, "saved"; all others stay as they are. Of tied names the first is written. Takes some 30 MiB, whatever the size
    of the model. A target that holds anything is refused, unless `overwrite`: then model files in it are replaced, once
    the new ones are safe on disk. Raises CheckpointError; what cannot be read or written leaves `target` as it was.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: choose among {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    target = Path(target)
    with open_checkpoint(folder, tag) as reader:
        warn_of_left_out(reader, "and the files lack them")
        if reader.manifest.state.get("extra_state"):
            logger.warning("%s: what modules keep as extra state is not exported; it is no tensor", reader.folder)
        tensors = _chosen(reader, DTYPES[dtype], exclude_frozen=exclude_frozen_parameters)
        shards = _named(_split(tensors, max_shard_bytes))
        reader.progress = Meter(tell, sum(each.stored.numel * each.stored.dtype.itemsize for each in tensors))
        try:
            return _write(Disk(), reader, shards, target, overwrite=overwrite)
        except OSError as error:
            where = error.filename or target
            raise CheckpointError(f"{where}: {error.strerror or error} while exporting") from error


def _chosen(reader: Reader, dtype: torch.dtype | None, *, exclude_frozen: bool) -> list[Exported]:
    return [
        Exported(each, each.as_floating(dtype) if dtype is not None else each.dtype)
        for each in stored_tensors(reader.manifest, exclude_frozen=exclude_frozen)
    ]


def _split(tensors: Sequence[Exported], max_bytes: int) -> list[list[Exported]]:
    """Tensors in order, as many to a shard as it may have bytes; a larger one has a shard of its own."""
    shards: list[list[Exported]] = [[]]
    filled = 0
    for each in tensors:
        if shards[-1] and filled + each.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(each)
        filled += each.nbytes
    # The largest elements first: a tensor that begins at no multiple of its element's size cannot be mapped.
    return [sorted(shard, key=lambda each: -each.dtype.itemsize) for shard in shards]


def _named(shards: list[list[Exported]]) -> dict[str, list[Exported]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": each for number, each in enumerate(shards, 1)}


def _write(
    disk: Disk, reader: Reader, shards: Mapping[str, list[Exported]], target: Path, *, overwrite: bool
) -> list[Path]:
    """Every file under another name first; when all are safe they take the places of earlier ones."""
    is_new = not target.exists()
    make_folder(disk, target)
    if not overwrite and any(target.iterdir()):
        raise CheckpointError(f"{target}: it is not empty; choose another folder, or overwrite=True (--overwrite)")
    temporary = {name: target / f"{name}.new" for name in shards}
    try:
        for name, path in temporary.items():
            with suppress(FileNotFoundError):
                disk.unlink(path)  # of an export that died
            _write_shard(disk, reader, path, shards[name])
        return _replace(disk, target, temporary, shards)
    except BaseException:
        for path in temporary.values():
            with suppress(OSError):
                disk.unlink(path)
        if is_new:
            with suppress(OSError):
                disk.remove_dir(target)
        raise


def _write_shard(disk: Disk, reader: Reader, path: Path, tensors: Sequence[Exported]) -> None:
    described = [(each.name, each.dtype, each.stored.shape) for each in tensors]
    file = disk.create(path)
    try:
        disk.write(file, memoryview(safetensors_header(described, {"format": "pt"})))
        for each in tensors:
            for block in reader.blocks(each.stored.key) if each.stored.numel else ():
                for part in block.split(CAST_NUMEL):
                    held = _cast(part, each)
                    disk.write(file, bytes_of(held))
        disk.sync(file)
    finally:
        os.close(file)


def _cast(part: Tensor, each: Exported) -> Tensor:
    """Raises CheckpointError if a finite number would become infinite."""
    cast = part.to(each.dtype)
    is_narrower = cast.dtype.itemsize < part.dtype.itemsize
    if is_narrower and bool(cast.isinf().any()) and bool((cast.isinf() & part.isfinite()).any()):
        largest = float(part[part.isfinite()].abs().max())
        raise CheckpointError(f"{each.name!r} holds {largest:g}, which does not fit {each.dtype}; choose another dtype")
    return cast


def _replace(
    disk: Disk, target: Path, temporary: Mapping[str, Path], shards: Mapping[str, list[Exported]]
) -> list[Path]:
    """Give the files their names. What an earlier export left goes first, and of it its index: it led to a mixture."""
    stale = [path for path in target.iterdir() if WEIGHTS.fullmatch(path.name)]
    for path in sorted(stale, key=lambda path: path.name != INDEX):
        if path.name not in shards and path not in temporary.values():
            disk.unlink(path)
    disk.sync_dir(target)
    for name, path in temporary.items():
        disk.rename(path, target / name)
    disk.sync_dir(target)
    written = [target / name for name in shards]
    if len(shards) > 1:
        write_file(disk, target / INDEX, _index(shards))
        written.append(target / INDEX)
    return written


def _index(shards: Mapping[str, list[Exported]]) -> bytes:
    places = {each.name: name for name, shard in shards.items() for each in shard}
    total = sum(each.nbytes for shard in shards.values() for each in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
