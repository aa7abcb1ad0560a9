"""Every file operation of a checkpoint, one method each: what a test can count, fail or record goes through here.

Nothing here follows a symbolic link in the last part of a path, and new files never replace what exists.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.memory.pages import ALIGNMENT, set_direct

WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in a file's place must not hold us up


class Disk:
    """The file system. Methods raise OSError."""

    def create(self, path: Path) -> int:
        """A descriptor to write a file that must not exist yet."""
        return os.open(path, WRITE, 0o666)

    def write(self, file: int, data: memoryview) -> None:
        """Append all of `data`. A file that is written past the page cache goes through it for the rest of a page."""
        while data:
            if len(data) % ALIGNMENT:
                set_direct(file, False)
            try:
                data = data[os.write(file, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not set_direct(file, False):
                    raise

    def sync(self, file: int) -> None:
        """Return when what was written to the file would survive a power cut."""
        os.fsync(file)

    def sync_dir(self, path: Path) -> None:
        """Return when the names in the folder would survive a power cut."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target` at once."""
        os.replace(source, target)

    def make_dir(self, path: Path) -> None:
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


def write_file(disk: Disk, path: Path, data: bytes, *, read_back: bool = False) -> None:
    """Replace the file `path` by one with this content: a reader sees the old one or the new one, also after a cut.

    Leaves the old one if it raises: OSError that names the file, or CheckpointDamagedError if `read_back` tells that
    the disk holds something else.
    """
    temporary = path.with_name(f"{path.name}.new")
    file = disk.create(temporary)
    try:
        try:
            disk.write(file, memoryview(data))
            disk.sync(file)
        finally:
            os.close(file)
        if read_back:
            _compare(temporary, data)
        disk.rename(temporary, path)
    except (OSError, CheckpointDamagedError) as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # of a call that takes a descriptor the system names none
        with suppress(OSError):
            disk.unlink(temporary)
        raise
    disk.sync_dir(path.parent)


def read_file(path: Path, *, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes. Raises CheckpointError if it is larger, and OSError."""
    file = os.open(path, READ)
    with os.fdopen(file, "rb") as stream:
        size = os.fstat(file).st_size
        if size > limit:
            raise CheckpointError(f"{path}: it has {size} bytes, and no such file has more than {limit}")
        return stream.read(limit)


def open_anew(path: Path) -> int:
    """A descriptor to read what the disk holds, rather than what is still in memory, where it surely is right."""
    file = os.open(path, READ)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def _compare(path: Path, data: bytes) -> None:
    with os.fdopen(open_anew(path), "rb") as stream:
        if stream.read(len(data) + 1) != data:
            raise CheckpointDamagedError(
                f"{path}: it is not what was written a moment ago; the disk or its driver is broken"
            )


def read_into(file: int, target: memoryview, *, offset: int) -> int:
    """Fill `target` with what the file holds from `offset` on; returns the bytes that there were."""
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must stay alive; no copy, whatever its dtype."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
