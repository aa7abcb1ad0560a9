"""One rank's data file: a safetensors file whose chunks are hashed in memory before they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zerolith.checkpoint.blocks import BlockWriter
from zerolith.checkpoint.content import Part
from zerolith.checkpoint.disk import Disk, bytes_of, open_anew, read_into
from zerolith.checkpoint.manifest import CHUNK_BYTES, DTYPES, NAMES, FileRecord, Piece, TensorRecord, checksum
from zerolith.errors import CheckpointDamagedError

HEADER_ALIGNMENT = 64  # bytes: safetensors' own writer pads to 8
STAGED_BYTES = 16 * CHUNK_BYTES  # of tensors on a device, copied to the host at a time; a multiple of a chunk


class Written(NamedTuple):
    """A data file as the manifest knows it; pieces name file 0."""

    file: FileRecord
    tensors: dict[str, TensorRecord]


def write_shard(
    disk: Disk, path: Path, parts: Sequence[Part], *, checkpoint: str, hashers: Executor | None = None
) -> Written:
    """Write `parts`, none of them empty unless its tensor is, to the new file `path` and see it safe on disk.

    `hashers` compute checksums beside the writing. Raises OSError, and leaves the file as it is then.
    """
    parts = sorted(parts, key=lambda part: -part.data.element_size())
    metadata = {"format": "zerolith", "checkpoint": checkpoint}
    header = safetensors_header([_described(part) for part in parts], metadata)
    file = disk.create(path)
    try:
        writer = BlockWriter(disk, file, hashers)
        try:
            writer.put(memoryview(bytearray(header)))
            pending = [_write_part(writer, part) for part in parts]
            writer.finish()
        finally:
            writer.settle()
        disk.sync(file)
    finally:
        os.close(file)
    digests = [[digest for task in tasks for digest in task.result()] for tasks in pending]
    tensors: dict[str, TensorRecord] = {}
    offset = len(header)
    for part, digest in zip(parts, digests, strict=True):
        record = TensorRecord(dtype=NAMES[part.data.dtype], shape=list(part.shape), pieces=[])
        piece = Piece(file=0, start=part.range.start, stop=part.range.stop, offset=offset, xxh3=digest)
        tensors.setdefault(part.name, record).pieces.extend([piece] if part.range.numel else [])
        offset += part.data.nbytes
    return Written(FileRecord(name=path.name, bytes=offset, header_xxh3=checksum(header)), tensors)


def read_back(path: Path, written: Written) -> None:
    """Compare what the disk gives back with what was meant. Raises CheckpointDamagedError, and OSError."""
    file = open_anew(path)
    try:
        sizes = [
            (name, piece, (piece.stop - piece.start) * DTYPES[record.dtype].itemsize)
            for name, record in written.tensors.items()
            for piece in record.pieces
        ]
        header = memoryview(bytearray(written.file.bytes - sum(size for _, _, size in sizes)))
        if read_into(file, header, offset=0) < len(header) or checksum(header) != written.file.header_xxh3:
            raise CheckpointDamagedError(
                f"{path}: its header is not what was written a moment ago; the disk or its driver is broken"
            )
        for name, piece, size in sizes:
            _compare(file, path, name, piece, size)
    finally:
        os.close(file)


def _compare(file: int, path: Path, name: str, piece: Piece, size: int) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for number, digest in enumerate(piece.xxh3):
        start = number * CHUNK_BYTES
        chunk = buffer[: min(CHUNK_BYTES, size - start)]
        if read_into(file, chunk, offset=piece.offset + start) < len(chunk) or checksum(chunk) != digest:
            raise CheckpointDamagedError(
                f"{path}: bytes {piece.offset + start} to {piece.offset + start + len(chunk)} of tensor {name!r} are "
                "not what was written a moment ago; the disk or its driver is broken"
            )


def safetensors_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """What a safetensors file begins with, for tensors (key, dtype, shape) that follow one another."""
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for key, dtype, shape in tensors:
        stop = offset + _numel(shape) * dtype.itemsize
        entries[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _described(part: Part) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """How a part is found in the file: a whole tensor by its name and shape, a range as a flat tensor of its own."""
    if part.range.numel == _numel(part.shape):
        return part.name, part.data.dtype, part.shape
    return f"{part.name}[{part.range.start}:{part.range.stop}]", part.data.dtype, (part.range.numel,)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _write_part(writer: BlockWriter, part: Part) -> list[Future[list[str]]]:
    data = part.make() if part.make else part.data
    is_kept = part.make is None and data.device.type == "cpu"
    tasks = []
    for block in [data] if data.device.type == "cpu" else _staged(data):
        tasks += writer.put(bytes_of(block))
        if not is_kept:
            writer.settle()  # the memory is another's after this
    return tasks


def _staged(data: Tensor) -> Iterator[Tensor]:
    """Copies of a device's tensor, some of it at a time, in host memory that is used again for the next."""
    per_block = STAGED_BYTES // data.element_size()
    staging = torch.empty(min(per_block, data.numel()), dtype=data.dtype, pin_memory=data.device.type == "cuda")
    for block in data.split(per_block):
        yield staging[: block.numel()].copy_(block)
