"""Reading every byte of a checkpoint and telling all that is not what was written, rather than the first of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zerolith.checkpoint.disk import read_into
from zerolith.checkpoint.manifest import DTYPES, Manifest, Piece, checksum, read_manifest
from zerolith.checkpoint.progress import Meter, Tell
from zerolith.checkpoint.reader import check_file, open_file
from zerolith.errors import CheckpointError


class Damage(NamedTuple):
    """A data file, or bytes [start, stop) of it, that are not what was written."""

    file: str
    what: str
    tensor: str = ""  # that has those bytes; "": the file itself
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        where = f" bytes {self.start} to {self.stop} of tensor {self.tensor!r}:" if self.tensor else ""
        return f"{self.file}:{where} {self.what}"


class _Held(NamedTuple):
    """A piece of a tensor in a file."""

    piece: Piece
    tensor: str
    nbytes: int


def damages(home: Path, *, tell: Tell | None = None) -> Iterator[Damage]:
    """All that is wrong with the data files of the checkpoint in `home`, file by file; nothing if it is whole.

    Raises CheckpointError, or its kind CheckpointDamagedError, for a manifest that cannot be read.
    """
    manifest = read_manifest(home)
    meter = Meter(tell, sum(record.bytes for record in manifest.files))
    held: list[list[_Held]] = [[] for _ in manifest.files]
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            nbytes = (piece.stop - piece.start) * DTYPES[tensor.dtype].itemsize
            held[piece.file].append(_Held(piece, name, nbytes))
    for number, record in enumerate(manifest.files):
        pieces = sorted(held[number], key=lambda each: each.piece.offset)
        yield from _damages_of(home / record.name, manifest, number, pieces, meter)


def _damages_of(path: Path, manifest: Manifest, number: int, pieces: list[_Held], meter: Meter) -> Iterator[Damage]:
    nbytes = manifest.files[number].bytes
    try:
        file = open_file(path)
    except CheckpointError as error:
        lost = len({each.tensor for each in pieces})
        yield Damage(path.name, f"{_why(error, path)}; it held {lost} tensors or parts of them")
        meter(nbytes)
        return
    try:
        try:
            check_file(file, path, manifest, number)
        except (CheckpointError, OSError) as error:
            yield Damage(path.name, _why(error, path))  # its tensors may be whole nevertheless
        meter(nbytes - sum(each.nbytes for each in pieces))
        for each in pieces:
            yield from _damages_in(file, path, manifest.chunk_bytes, each, meter)
    finally:
        os.close(file)


def _damages_in(file: int, path: Path, chunk_bytes: int, held: _Held, meter: Meter) -> Iterator[Damage]:
    """Neighbouring chunks that are wrong in the same way as one."""
    buffer = memoryview(bytearray(min(chunk_bytes, held.nbytes)))
    run: Damage | None = None
    for number, digest in enumerate(held.piece.xxh3):
        start = number * chunk_bytes
        chunk = buffer[: min(chunk_bytes, held.nbytes - start)]
        first = held.piece.offset + start
        what = _problem(file, chunk, first, digest)
        if run is not None and what == run.what:
            run = run._replace(stop=first + len(chunk))
        else:
            if run is not None:
                yield run
            run = Damage(path.name, what, held.tensor, first, first + len(chunk)) if what else None
        meter(len(chunk))
    if run is not None:
        yield run


def _problem(file: int, chunk: memoryview, offset: int, digest: str) -> str:
    try:
        count = read_into(file, chunk, offset=offset)
    except OSError as error:
        return f"the disk does not give them ({error.strerror})"
    if count < len(chunk):
        return "the file ends before or in them"
    return "" if checksum(chunk) == digest else "their checksum is wrong"


def _why(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
