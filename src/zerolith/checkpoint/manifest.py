"""What a checkpoint says of itself: manifest.json, whose appearance makes a checkpoint one.

docs/checkpoint-format.md describes it for readers that are not ours. No tensors, no processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from zerolith.checkpoint.disk import read_file
from zerolith.errors import CheckpointDamagedError, CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "zerolith-checkpoint", 1
CHUNK_BYTES = 2**20  # what one checksum covers; small enough to stay in a core's cache between reading and hashing
LIMIT = 2**30  # bytes of a manifest: a model of a million parameters on thousands of ranks has less
TRAILER = re.compile(rb',\n"xxh3": "([0-9a-f]{16})"}\n')
TRAILER_BYTES = 30

DTYPES: Mapping[str, torch.dtype] = {  # safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,}-[0-9a-f]{16}\.safetensors$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(_Record):
    """One data file."""

    name: FileName
    bytes: Count
    header_xxh3: Digest  # of the first 8 bytes and the JSON that they announce


class Piece(_Record):
    """Elements [start, stop) of a flattened tensor, and where a data file holds them."""

    file: Count  # index into `files`
    start: Count
    stop: Count
    offset: Count  # bytes from the head of the file
    xxh3: list[Digest]  # of each `chunk_bytes` of the piece; the last chunk may be shorter


class TensorRecord(_Record):
    """One logical tensor, put together from pieces in any order that do not overlap."""

    dtype: str  # safetensors' name
    shape: list[Count]
    pieces: list[Piece]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class ParameterRecord(_Record):
    """What is known of one parameter beside its tensors."""

    shape: list[Count]
    dtype: str  # that the model computed in
    trained: bool
    aliases: list[str] = []  # other names of the same tensor in the model
    optimizer: dict[str, JsonValue] | None = None  # its state that is not one number per element; None: no state


class Manifest(_Record):
    """The whole description of one checkpoint."""

    format: Literal["zerolith-checkpoint"] = "zerolith-checkpoint"
    version: Literal[1] = 1
    id: Digest  # chosen anew for every save
    created: str  # ISO 8601, UTC
    libraries: dict[str, str]
    step: Count
    num_ranks: Count
    chunk_bytes: Annotated[int, Field(ge=256, le=2**30, multiple_of=16)] = CHUNK_BYTES
    files: list[FileRecord]
    tensors: dict[str, TensorRecord]
    parameters: dict[str, ParameterRecord]
    state: dict[str, JsonValue]


def checksum(data: Any) -> str:  # any bytes-like object
    """XXH3, 64 bits, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: JSON that ends with the checksum of all that is before the trailer."""
    body = manifest.model_dump_json(exclude_defaults=False).encode()[:-1]
    return body + b',\n"xxh3": "' + checksum(body).encode() + b'"}\n'


def decode(data: bytes, *, where: Path) -> Manifest:
    """Undo `encode`. Raises CheckpointDamagedError for anything that encode did not write."""
    body, trailer = data[:-TRAILER_BYTES], data[-TRAILER_BYTES:]
    match = TRAILER.fullmatch(trailer)
    if match is None:
        raise CheckpointDamagedError(f"{where}: it does not end with its checksum, so it is cut off or not ours")
    if checksum(body).encode() != match[1]:
        raise CheckpointDamagedError(f"{where}: its content does not match its checksum, so it has been changed")
    try:
        manifest = Manifest.model_validate_json(body + b"}")
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{where}: {path}: {first['msg']}; it was written by a version of zerolith that this one does not know"
        ) from error
    _check(manifest, where)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`. Raises CheckpointError or one of its kinds."""
    path = folder / MANIFEST
    try:
        return decode(read_file(path, limit=LIMIT), where=path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: there is no checkpoint here ({MANIFEST} is missing)") from error
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror})") from error


def _check(manifest: Manifest, where: Path) -> None:
    """That pieces lie inside their files, cover their tensors once, and have a checksum for each chunk."""
    for name, tensor in manifest.tensors.items():
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{where}: {name!r} has dtype {tensor.dtype!r}, which this version does not know")
        reached = 0
        for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
            size = (piece.stop - piece.start) * dtype.itemsize
            is_right = (
                piece.start == reached < piece.stop
                and piece.file < len(manifest.files)
                and piece.offset + size <= manifest.files[piece.file].bytes
                and len(piece.xxh3) == -(-size // manifest.chunk_bytes)
            )
            if not is_right:
                raise CheckpointError(f"{where}: {name!r} has a piece [{piece.start}, {piece.stop}) that cannot be")
            reached = piece.stop
        if reached != tensor.numel:
            raise CheckpointError(f"{where}: {name!r} has {tensor.numel} elements, of which {reached} are there")
