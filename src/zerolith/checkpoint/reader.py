"""Reading a committed checkpoint: any range of any tensor, every byte checked on the way."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import torch
from torch import Tensor

from zerolith.checkpoint.content import Part
from zerolith.checkpoint.disk import READ, bytes_of, read_into
from zerolith.checkpoint.manifest import DTYPES, Manifest, Piece, TensorRecord, checksum, read_manifest
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range

Progress = Callable[[int], object]  # told of bytes that have been read

BLOCK_CHUNKS = 16  # read at once


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
        self._scratch = torch.empty(BLOCK_CHUNKS * self.manifest.chunk_bytes, dtype=torch.uint8)

    def _open_all(self) -> None:
        try:
            for number in range(len(self.manifest.files)):
                self._files.append(self._open(number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

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

    def fill(self, parts: Iterable[Part], *, hasher: Executor | None = None) -> None:
        """Copy the checkpoint's values into the memory of `parts`, cast to its dtype; only needed chunks are read.

        Raises CheckpointDamagedError with file, tensor and bytes at the first chunk that is not what was written;
        some of `parts` have new values then.
        """
        for part in parts:
            record = self.record(part.name)
            for piece in record.pieces:
                wanted = Range(piece.start, piece.stop).clip(part.range)
                if wanted.numel:
                    self._fill_from(piece, wanted, record, part, hasher)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The elements of `name` in order, flat, some at a time and each checked. The memory is reused.

        Raises CheckpointError, CheckpointDamagedError at the first chunk that is not what was written.
        """
        record = self.record(name)
        for piece in sorted(record.pieces, key=lambda piece: piece.start):
            for _, block in self._checked(name, piece, Range(0, _piece_bytes(self.manifest, name, piece)), None):
                yield block.view(DTYPES[record.dtype])

    def verify(self) -> None:
        """Read and check every byte. Raises CheckpointDamagedError at the first that is wrong."""
        for name, record in self.manifest.tensors.items():
            size = DTYPES[record.dtype].itemsize
            for piece in record.pieces:
                for at, block in self._checked(name, piece, Range(0, (piece.stop - piece.start) * size), None):
                    del at, block

    def _fill_from(
        self, piece: Piece, wanted: Range, record: TensorRecord, part: Part, hasher: Executor | None
    ) -> None:
        dtype = DTYPES[record.dtype]
        span = Range((wanted.start - piece.start) * dtype.itemsize, (wanted.stop - piece.start) * dtype.itemsize)
        target = part.data[wanted.start - part.range.start : wanted.stop - part.range.start]
        if self._is_direct(piece, span, record, target):
            memory = bytes_of(target)
            for start in range(0, span.numel, BLOCK_CHUNKS * self.manifest.chunk_bytes):
                own = memory[start : start + BLOCK_CHUNKS * self.manifest.chunk_bytes]
                held = Range(span.start + start, span.start + start + len(own))
                self._read(piece, held, own, part.name, hasher)
            return
        for at, block in self._checked(part.name, piece, span, hasher):
            values = block.view(dtype)
            target[at // dtype.itemsize :][: values.numel()].copy_(values)

    def _is_direct(self, piece: Piece, span: Range, record: TensorRecord, target: Tensor) -> bool:
        """Whether whole chunks may be read straight into `target`'s memory."""
        chunk = self.manifest.chunk_bytes
        is_same = target.device.type == "cpu" and target.dtype == DTYPES[record.dtype] and target.is_contiguous()
        is_end = span.stop == (piece.stop - piece.start) * target.element_size()
        return is_same and span.start % chunk == 0 and (is_end or span.stop % chunk == 0)

    def _checked(self, name: str, piece: Piece, span: Range, hasher: Executor | None) -> Iterable[tuple[int, Tensor]]:
        """(bytes from the start of `span`, that part of it) in order, each checked. The tensors are reused."""
        chunk = self.manifest.chunk_bytes
        size = _piece_bytes(self.manifest, name, piece)
        first, last = span.start // chunk, -(-span.stop // chunk)
        for head in range(first, last, BLOCK_CHUNKS):
            held = Range(head * chunk, min(size, min(last, head + BLOCK_CHUNKS) * chunk))
            block = self._scratch[: held.numel]
            self._read(piece, held, bytes_of(block), name, hasher)
            part = span.clip(held)
            yield part.start - span.start, block[part.start - held.start : part.stop - held.start]

    def _read(self, piece: Piece, held: Range, target: memoryview, name: str, hasher: Executor | None) -> None:
        chunk, file = self.manifest.chunk_bytes, self._files[piece.file]
        pending: list[tuple[int, str | Future[str]]] = []
        for start in range(0, held.numel, chunk):
            part = target[start : start + chunk]
            if read_into(file, part, offset=piece.offset + held.start + start) < len(part):
                raise self._damage(piece, name, held.start + start, len(part), "the file ends in it")
            pending.append((start, checksum(part) if hasher is None else hasher.submit(checksum, part)))
        for start, digest in pending:
            found = digest if isinstance(digest, str) else digest.result()
            if found != piece.xxh3[(held.start + start) // chunk]:
                length = min(chunk, held.numel - start)
                raise self._damage(piece, name, held.start + start, length, "their checksum is wrong")
        self.progress(held.numel)

    def _damage(self, piece: Piece, name: str, start: int, length: int, what: str) -> CheckpointDamagedError:
        path = self.folder / self.manifest.files[piece.file].name
        first = piece.offset + start
        return CheckpointDamagedError(
            f"{path}: bytes {first} to {first + length} of tensor {name!r} are not what was saved ({what})"
        )

    def _open(self, number: int) -> int:
        path = self.folder / self.manifest.files[number].name
        file = open_file(path)
        try:
            check_file(file, path, self.manifest, number)
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


def _piece_bytes(manifest: Manifest, name: str, piece: Piece) -> int:
    return (piece.stop - piece.start) * DTYPES[manifest.tensors[name].dtype].itemsize
