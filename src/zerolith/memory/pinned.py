"""Host memory for transfers: ordinary memory, page-locked by CUDA where a device copies by itself.

torch's allocator of page-locked memory rounds sizes up to powers of two and keeps what is freed. This is whole pages,
which go with the last tensor over them.

[Note: forks] A child that is forked has no page-locked memory of its parent: there is a hole where it was. Else the
kernel would copy all of it for the child at once, or, where it is older, leave the device with pages that the parent no
longer has. So a tensor that comes into a child must not be read there; when it goes, nothing is done, for something of
the child's own may fill the hole by then, and CUDA is the parent's.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from zerolith.errors import OffloadError
from zerolith.memory.pages import map_pages, unmap_pages

logger = logging.getLogger("zerolith")
Runtime = Any  # torch's module over CUDA's runtime, which has no types: cudaHostRegister, cudaHostUnregister, ...

cudart: Callable[[], Runtime] = torch.cuda.cudart
# By address. No lock and no sum beside it: garbage collection ends memory at any moment and on any thread, also on one
# that is in here.
_locked: dict[int, int] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locked.clear)


def locked_bytes() -> int:
    """Bytes that this process has page-locked here."""
    return sum(_locked.copy().values())


def host_bytes(nbytes: int, *, pinned: bool) -> Tensor:
    """(nbytes,) uint8 of host memory with undefined content, page-locked if told: whole pages then.

    Raises OffloadError if there is none.
    """
    if pinned and nbytes:
        return _page_locked(nbytes)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where there is no memory
        raise OffloadError(f"the host has no room for {nbytes} bytes: {error}") from error


def _page_locked(nbytes: int) -> Tensor:
    runtime = cudart()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # -1: torch takes it for no device
    room = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        address = map_pages(room)
    except OSError as error:
        raise OffloadError(f"the host has no room for {nbytes} bytes: {error}") from error
    # Not Python's mmap, whose finalizers run when it is unmapped already.
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    release = weakref.finalize(memory, _release, address, room, runtime, device, os.getpid())
    release.atexit = False  # the process gives all of it back, and CUDA may be gone by then
    with torch.cuda.device(device):
        result = runtime.cudaHostRegister(address, room, 0)
    if int(result):
        said = runtime.cudaGetErrorString(result)
        release()
        _take_error(device)
        raise OffloadError(
            f"the host has no room for {nbytes} bytes: CUDA says {said!r} to "
            f"page-locking them; this process has page-locked {locked_bytes()} bytes already. Offload less, use more "
            "hosts, or give the host or its container more memory"
        )
    _locked[address] = room
    return torch.frombuffer(memory, dtype=torch.uint8)


def _release(address: int, room: int, runtime: Runtime, device: int, pid: int) -> None:
    """Let memory go that no tensor has any more. Garbage collection calls it, at any moment and on any thread."""
    if os.getpid() != pid:
        return  # see [Note: forks]
    if _locked.pop(address, None) is not None:
        with torch.cuda.device(device):
            if device >= 0:
                with suppress(RuntimeError):  # of a device that has failed before
                    torch.cuda.synchronize()  # copies under way may use it: torch does not know this memory
            result = runtime.cudaHostUnregister(address)
        if int(result):
            _take_error(device)
            said = runtime.cudaGetErrorString(result)
            logger.warning("%d bytes stay in memory: CUDA says %r to unlocking them", room, said)
            return  # the device may reach them still
    unmap_pages(address, room)


def _take_error(device: int) -> None:
    """CUDA tells its last error once more, to the next kernel: let that be one of ours."""
    if device >= 0:
        with suppress(RuntimeError):
            torch.ones(1, device=torch.device("cuda", device))
