"""Host memory for training on the CPU."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1
LARGE = 32 * 2**20  # bytes: the most that every glibc takes as threshold
# The last is torch's: aligned to huge pages, no freed block has room for the next of its size, and memory would grow.
USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")


def keep_freed_pages(*, only_small: bool) -> bool:
    """Let this process keep the pages of freed tensors for the next ones; returns whether it could.

    glibc gives large blocks back to the kernel at every free, and the next tensor of that size pays for fresh pages:
    first touch of 28 MB cost 50 ms against 6 ms for a copy into pages at hand (2 cores, Linux 6.18), at every gather
    and every activation. A training step frees and allocates the same sizes again and again, so its peak rises little
    where most of what it needs stays. Where whole units come and go in turn it rises by half, as their places lie
    between each other's; with `only_small` blocks of LARGE bytes and more come from the kernel and go back to it, and
    it rises by a twentieth. Settings that the user made by environment variables stand. Elsewhere than on glibc it
    does nothing.
    """
    if any(name in os.environ for name in USER_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE if only_small else LARGEST)) and bool(
        mallopt(M_TRIM_THRESHOLD, LARGEST)
    )


def resident_bytes() -> int:
    """Memory that this process holds now, in bytes; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_of_host(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Bytes that this process and its like may have in all, and those that are free now; None where nobody tells.

    A container's limit counts if it is lower.
    """
    try:
        amounts = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE))
        total, free = (1024 * int(amounts[name]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError):
        return None
    try:
        limit, used = (int((cgroups / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return total, free
    return min(total, limit), min(free, max(0, limit - used))
