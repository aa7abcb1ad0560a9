"""Memory in whole pages, and transfers past the page cache (O_DIRECT), which ask for it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from contextlib import suppress

ALIGNMENT = 4096  # bytes: of file offsets, lengths and addresses
HUGE_PAGE_BYTES = 2 * 2**20
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)  # off_t, with 64 bits
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def set_direct(file: int, wanted: bool) -> bool:
    """Transfer past the page cache from here on, or through it; returns whether that is a change.

    A file system that cannot (tmpfs, some on networks) stays as it is.
    """
    try:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if not _DIRECT or bool(flags & _DIRECT) == wanted:
            return False
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
    except OSError:
        return False
    return True


def page_buffer(nbytes: int) -> memoryview:
    """Aligned memory of its own, on huge pages where there are any: the device takes fewer, larger requests then.

    Raises MemoryError or OSError if there is none; freed with the last view of it.
    """
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -address_of(memoryview(pages)) % HUGE_PAGE_BYTES
    whole = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES  # what is left would take a huge page for itself
    if hasattr(mmap, "MADV_HUGEPAGE") and whole:
        with suppress(OSError):  # of a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memoryview(pages)[start : start + nbytes]


def address_of(memory: memoryview) -> int:
    """Where writable memory begins; the view must be kept while the address is used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Let memory that nobody has touched yet lie on huge pages, as far as there are whole ones in it.

    It is touched for the first time several times faster then, and a disk moves it in fewer, larger pieces. A system
    without them goes on as it does.
    """
    start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    whole = (address + nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if whole > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        _libc.madvise(start, whole, mmap.MADV_HUGEPAGE)


def map_pages(nbytes: int) -> int:
    """Address of memory of this process alone: a child that is forked has a hole there.

    `nbytes` is a multiple of the page; whole huge pages in it are such where there are any. Raises OSError if there is
    no memory. It stays until `unmap_pages`, whoever forgets it.
    """
    whole = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    slack = HUGE_PAGE_BYTES if whole else 0
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = _libc.mmap(None, nbytes + slack, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
    if mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    before = -mapped % HUGE_PAGE_BYTES if whole else 0
    start = mapped + before
    unmap_pages(mapped, before)
    unmap_pages(start + nbytes, slack - before)
    for name, length in (("MADV_HUGEPAGE", whole), ("MADV_DONTFORK", nbytes)):
        if hasattr(mmap, name) and length:
            _libc.madvise(start, length, getattr(mmap, name))  # a kernel without it goes on as it does
    return start


def unmap_pages(address: int, nbytes: int) -> None:
    """Give memory of `map_pages` back, which nobody may touch from then on."""
    if nbytes:
        _libc.munmap(address, nbytes)
