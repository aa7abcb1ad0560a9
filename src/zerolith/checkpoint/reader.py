"""Reading a committed checkpoint: any range of any tensor, every byte checked on the way."""

from __future__ import annotations

import math
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zerolith.checkpoint.blocks import READS_AHEAD, BlockReader, Span
from zerolith.checkpoint.content import Part
from zerolith.checkpoint.disk import READ, read_into
from zerolith.checkpoint.manifest import DTYPES, Manifest, Piece, TensorRecord, checksum, read_manifest
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range
from zerolith.memory.pages import set_direct
from zerolith.memory.threads import helpers

K = TypeVar("K")
Progress = Callable[[int], object]  # told of bytes that have been read


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive chunks of a piece of a tensor; each has a checksum of its own."""

    name: str  # of the tensor
    dtype: torch.dtype
    piece: Piece
    first: int
    last: int  # not of them any more

    def chunks(self, chunk_bytes: int) -> Iterator[_Chunk]:
        nbytes = (self.piece.stop - self.piece.start) * self.dtype.itemsize
        for number in range(self.first, self.last):
            start = number * chunk_bytes
            yield _Chunk(self, number, start, min(nbytes, start + chunk_bytes))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [start, stop) of a piece."""

    of: _Stretch
    number: int
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """In the file."""
        return self.of.piece.offset + self.start


class Reader:
    """An open checkpoint. `close()` it, or use it in `with`.

    Opening it reads the manifest and checks that every data file is there, is as long as it should be and begins as
    it should; so a checkpoint that cannot be read is refused before anything has been touched. Raises CheckpointError.
    """

    def __init__(self, folder: Path, *, progress: Progress = lambda count: None) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.progress = progress
        self._files: list[int] = []
        while True:
            try:
                self._open_all()
                break
            except CheckpointError:
                before, self.manifest = self.manifest, read_manifest(folder)
                if before.id == self.manifest.id:  # else the tag was saved again in between
                    raise
        self._helpers = helpers(READS_AHEAD, "zerolith reader")
        try:
            self._blocks = BlockReader(self.manifest.chunk_bytes, self._helpers)
        except BaseException:
            self.close()
            raise

    def _open_all(self) -> None:
        try:
            for number in range(len(self.manifest.files)):
                self._files.append(self._open(number))
        except BaseException:
            self._close_all()
            raise

    def _close_all(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._helpers is not None:
            self._helpers.shutdown()
        self._close_all()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor `name` in the dtype of the file, on the CPU. Raises CheckpointError."""
        record = self.record(name)
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        self.fill([Part.whole(name, whole)])
        return whole

    def record(self, name: str) -> TensorRecord:
        """Raises CheckpointError if there is no such tensor."""
        record = self.manifest.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.folder}: it has no tensor {name!r}")
        return record

    def fill(self, parts: Iterable[Part]) -> None:
        """Copy the checkpoint's values into the memory of `parts`, cast to its dtype; only needed chunks are read.

        Raises CheckpointDamagedError with file, tensor and bytes at the first chunk that is not what was written;
        some of `parts` have new values then. Raises CheckpointError if the disk does not give one.
        """
        self.fill_groups({None: parts}, lambda group: None)

    def fill_groups(self, groups: Mapping[K, Iterable[Part]], arrived: Callable[[K], object]) -> None:
        """`fill` several groups of parts; `arrived` is told of each that has its values, while others are being read.

        What it raises ends the reading.
        """
        wanted = [
            (stretch, part, group)
            for group, parts in groups.items()
            for part in parts
            for stretch in self._stretches(part.name, part.range)
        ]
        wanted.sort(key=lambda each: (each[0].piece.file, each[0].piece.offset, each[0].first))
        missing = Counter(group for _, _, group in wanted)
        for group in groups:
            if not missing[group]:
                arrived(group)
        with closing(self._checked(stretch for stretch, _, _ in wanted)) as data:
            for stretch, part, group in wanted:
                for chunk, held in islice(data, stretch.last - stretch.first):
                    _put(chunk, held, part)
                missing[group] -= 1
                if not missing[group]:
                    arrived(group)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The elements of `name` in order, flat, some at a time and each checked. The memory is reused.

        Raises as `fill` does.
        """
        record = self.record(name)
        for _, held in self._checked(self._stretches(name, Range(0, math.prod(record.shape)))):
            yield torch.frombuffer(held, dtype=DTYPES[record.dtype])

    def _stretches(self, name: str, wanted: Range) -> Iterator[_Stretch]:
        """The chunks that hold elements `wanted` of a tensor."""
        record, chunk_bytes = self.record(name), self.manifest.chunk_bytes
        dtype = DTYPES[record.dtype]
        for piece in sorted(record.pieces, key=lambda piece: piece.start):
            part = Range(piece.start, piece.stop).clip(wanted).shift(-piece.start)
            if part.numel:
                first, last = part.start * dtype.itemsize // chunk_bytes, -(-part.stop * dtype.itemsize // chunk_bytes)
                yield _Stretch(name, dtype, piece, first, last)

    def _checked(self, stretches: Iterable[_Stretch]) -> Generator[tuple[_Chunk, memoryview], None, None]:
        """Each chunk and its bytes; the memory is reused."""
        coming: deque[_Chunk] = deque()  # those that are being read, or will be soon

        def spans() -> Iterator[Span]:
            for stretch in stretches:
                for chunk in stretch.chunks(self.manifest.chunk_bytes):
                    coming.append(chunk)
                    yield Span(self._files[stretch.piece.file], chunk.offset, chunk.stop - chunk.start)

        data = self._blocks.read(spans())
        try:
            for held in data:
                chunk = coming[0]
                if len(held) < chunk.stop - chunk.start:
                    raise self._damage(chunk, "the file ends in it")
                if checksum(held) != chunk.of.piece.xxh3[chunk.number]:
                    raise self._damage(chunk, "their checksum is wrong")
                yield chunk, held
                coming.popleft()
                self.progress(len(held))
        except OSError as error:
            raise CheckpointError(f"{self._place(coming[0])} cannot be read ({error.strerror})") from error
        finally:
            data.close()

    def _damage(self, chunk: _Chunk, what: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f"{self._place(chunk)} are not what was saved ({what})")

    def _place(self, chunk: _Chunk) -> str:
        path = self.folder / self.manifest.files[chunk.of.piece.file].name
        stop = chunk.offset + chunk.stop - chunk.start
        return f"{path}: bytes {chunk.offset} to {stop} of tensor {chunk.of.name!r}"

    def _open(self, number: int) -> int:
        path = self.folder / self.manifest.files[number].name
        file = open_file(path)
        try:
            check_file(file, path, self.manifest, number)
            set_direct(file, True)
        except BaseException:
            os.close(file)
            raise
        return file


def open_file(path: Path) -> int:
    """A descriptor of a data file. Raises CheckpointError."""
    try:
        file = os.open(path, READ)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path}: this file of the checkpoint is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be opened ({error.strerror}); links are not followed") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointDamagedError(f"{path}: it is not a regular file")
    return file


def check_file(file: int, path: Path, manifest: Manifest, number: int) -> None:
    """That data file `number` is as long as it should be and begins as it should. Raises CheckpointDamagedError."""
    record, size = manifest.files[number], os.fstat(file).st_size
    if size != record.bytes:
        raise CheckpointDamagedError(f"{path}: it has {size} bytes, and {record.bytes} were written")
    head = bytearray(8)
    read_into(file, memoryview(head), offset=0)
    length = int.from_bytes(head, "little")
    whole = bytearray(8 + length) if 8 + length <= record.bytes else head
    read_into(file, memoryview(whole), offset=0)
    if checksum(whole) != record.header_xxh3:
        is_other = b'"checkpoint":"' in whole and manifest.id.encode() not in whole
        why = "it belongs to another checkpoint" if is_other else "its header is not what was written"
        raise CheckpointDamagedError(f"{path}: {why}")


def _put(chunk: _Chunk, data: memoryview, part: Part) -> None:
    """Copy those elements of a chunk that `part` takes to their places."""
    piece, dtype = chunk.of.piece, chunk.of.dtype
    first = piece.start + chunk.start // dtype.itemsize  # element of the tensor
    both = Range(first, first + len(data) // dtype.itemsize).clip(part.range)
    values = torch.frombuffer(data, dtype=dtype)[both.start - first : both.stop - first]
    part.data[both.start - part.range.start : both.stop - part.range.start].copy_(values)
