"""The zip file that torch.save writes: its records, and bytes of them.

Read-only, and read by position: nothing is mapped, so a file that is cut while it is read is an error like any other.
Knows nothing of pickles and tensors.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from zerolith.checkpoint.disk import read_into
from zerolith.errors import CheckpointDamagedError, CheckpointError

MAX_DIRECTORY_BYTES = 2**26  # a hundred thousand tensors need some ten million
CHUNK_BYTES = 2**20
LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
LOCAL_HEADER = struct.Struct("<4s22xHH")
BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One file in the zip file, stored as it is."""

    name: str  # without the folder that all records share
    header: int  # where its local header begins
    nbytes: int
    crc: int  # 0: torch was told not to compute it


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file of torch.save."""

    path: Path
    records: dict[str, Record] = field(repr=False)
    identity: tuple[int, int, int]

    def read(self, record: Record, target: memoryview, *, offset: int = 0) -> None:
        """Fill `target` with the record's bytes from `offset` on. Raises CheckpointError."""
        if offset < 0 or offset + len(target) > record.nbytes:
            raise self.damaged(record.name, f"it has {record.nbytes} bytes, {offset + len(target)} needed")
        with opened(self.path) as file:
            if _identity(file) != self.identity:
                raise CheckpointError(f"{self.path}: it has changed since it was opened; read the checkpoint again")
            start = self._start(record, file) + offset
            if read_into(file, target, offset=start) != len(target):
                raise self.damaged(record.name, "the file ends within it")
        if len(target) == record.nbytes and record.crc and zlib.crc32(target) != record.crc:
            raise self.damaged(record.name, "its bytes do not match its checksum")

    def read_all(self, record: Record) -> bytes:
        """The whole of a record that is known to be small."""
        data = bytearray(record.nbytes)
        self.read(record, memoryview(data))
        return bytes(data)

    def verify(self) -> None:
        """Read every byte of every record, a chunk at a time. Raises CheckpointDamagedError for a wrong checksum."""
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for record in self.records.values():
            crc = 0
            for offset in range(0, record.nbytes, CHUNK_BYTES):
                chunk = buffer[: min(CHUNK_BYTES, record.nbytes - offset)]
                self.read(record, chunk, offset=offset)
                crc = zlib.crc32(chunk, crc)
            if record.crc and crc != record.crc:
                raise self.damaged(record.name, "its bytes do not match its checksum")

    def damaged(self, record: str, what: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f"{self.path}, entry {record!r}: {what}")

    def _start(self, record: Record, file: int) -> int:
        """Where the record's bytes begin: its local header may be longer than the directory says."""
        header = os.pread(file, LOCAL_HEADER.size, record.header)
        if len(header) < LOCAL_HEADER.size:
            raise self.damaged(record.name, "the file ends within its header")
        magic, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise self.damaged(record.name, "it has no header where the directory says")
        return record.header + LOCAL_HEADER.size + name_bytes + extra_bytes


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for reading. Raises CheckpointError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path}: it is not there") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: it cannot be opened ({error})") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CheckpointError(f"{path}: it is not a regular file")
        yield file
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror or error})") from error
    finally:
        os.close(file)


def open_archive(path: Path) -> Archive:
    """Read the directory of a file of torch.save. Raises CheckpointError, CheckpointDamagedError if it is not one."""
    with opened(path) as file:
        head = os.pread(file, len(LEGACY_HEAD), 0)
        if head == LEGACY_HEAD:
            raise CheckpointError(
                f"{path}: it is in the format of torch.save before 1.6, which is one long pickle and not supported; "
                'save with "checkpoint": {"checkpoint_serialization": true} in the DeepSpeed config'
            )
        try:
            with _Careful(os.dup(file)) as stream, zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
        except BROKEN_ZIP as error:
            raise CheckpointDamagedError(f"{path}: it is no whole file of torch.save ({error})") from error
        identity = _identity(file)
    return Archive(path=path, records=_records(path, infos, size=identity[0]), identity=identity)


class _Careful(io.FileIO):
    """A file of which no single read takes more memory than a directory may."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {wanted} bytes")
        return super().read(max(wanted, 0)) or b""


def _records(path: Path, infos: list[zipfile.ZipInfo], *, size: int) -> dict[str, Record]:
    roots = [info.filename.partition("/")[0] for info in infos if info.filename.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise CheckpointDamagedError(f"{path}: it is no file of torch.save: {len(roots)} entries 'data.pkl', not one")
    records: dict[str, Record] = {}
    for info in infos:
        root, _, name = info.filename.partition("/")
        where = f"{path}, entry {info.filename[:200]!r}"
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointDamagedError(f"{where}: it is compressed or encrypted, as torch.save never does")
        if info.header_offset < 0 or info.header_offset + info.file_size > size:
            raise CheckpointDamagedError(f"{where}: {info.file_size} bytes would not fit into the file")
        if root == roots[0]:
            if name in records:
                raise CheckpointDamagedError(f"{where}: it is there twice")
            records[name] = Record(name=name, header=info.header_offset, nbytes=info.file_size, crc=info.CRC)
    return records


def _identity(file: int) -> tuple[int, int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino
