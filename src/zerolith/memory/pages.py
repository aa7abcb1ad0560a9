"""Transfers past the page cache (O_DIRECT): what they ask of descriptors, addresses and lengths."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from contextlib import suppress

ALIGNMENT = 4096  # bytes: of file offsets, lengths and addresses
HUGE_PAGE_BYTES = 2 * 2**20
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none


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
