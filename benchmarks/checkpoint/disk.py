"""The file system as the driver handles it: which kind it is, files synced, out of the page cache, or all in it.

Standard library only; the page cache is Linux's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

IN_MEMORY = ("ramfs", "tmpfs")
READ_BYTES = 4 * 2**20


def parse_mounts(mounts: str, path: Path) -> str:
    """The type of the file system that holds `path`, from the text of /proc/mounts."""
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, point, found, *_ = line.split()
        home = Path(point.replace("\\040", " "))
        if (path == home or home in path.parents) and len(home.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(home.parts), found
    return kind


def file_system(path: Path) -> str:
    return parse_mounts(Path("/proc/mounts").read_text(), path.resolve())


def files_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def sync(folder: Path) -> None:
    """Return when every file below the folder is safe on disk, whoever wrote it."""
    for path in files_in(folder):
        _with_file(path, os.fsync)


def drop_cache(folder: Path) -> float:
    """Put the files below the folder out of the page cache; returns the fraction that stayed. They must be synced."""
    for path in files_in(folder):
        _with_file(path, lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))
    return cached_bytes(folder) / max(1, size_of(folder))


def warm_cache(folder: Path) -> float:
    """Read the files below the folder into the page cache; returns the fraction that is there."""
    buffer = bytearray(READ_BYTES)
    for path in files_in(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return cached_bytes(folder) / max(1, size_of(folder))


def cached_bytes(folder: Path) -> int:
    """Bytes of the files below the folder that are in the page cache, in whole pages."""
    return sum(_cached_pages(path) * mmap.PAGESIZE for path in files_in(folder))


def available_bytes() -> int:
    """Memory that could be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no field MemAvailable in /proc/meminfo.")


def _cached_pages(path: Path) -> int:
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        view = ctypes.c_char.from_buffer(pages)  # which needs a writable map; nothing is touched
        held = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        failed = libc.mincore(ctypes.addressof(view), size, held)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(byte & 1 for byte in held.raw[: -(-size // mmap.PAGESIZE)])


def _with_file(path: Path, do: Callable[[int], object]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        do(file)
    finally:
        os.close(file)
