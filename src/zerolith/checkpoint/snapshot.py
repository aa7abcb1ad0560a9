"""A checkpoint's copy on the host, from which it is written while the training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zerolith.checkpoint.content import Part
from zerolith.memory.pinned import host_bytes

ALIGNMENT = 64  # bytes


class Snapshot:
    """Owner of the copy's memory, which is kept for the next one.

    It is one piece for what is on a device, page-locked, and one for what is on the host already: so page-locked memory
    is as large as what is copied, and locked once.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, Tensor] = {}  # by whether it is page-locked

    def take(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with data of the copy. Overwrites the last one.

        Raises OffloadError, MemoryError or RuntimeError where there is no memory; none is held then.
        """
        try:
            copies = self._copied(parts)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception:
            self.clear()
            raise
        return copies

    def clear(self) -> None:
        """Let the memory go."""
        self._memory.clear()

    def _copied(self, parts: Sequence[Part]) -> list[Part]:
        needed = {True: 0, False: 0}
        starts = []
        for part in parts:
            far = is_far(part.data)
            starts.append(needed[far])
            needed[far] += -(-part.data.nbytes // ALIGNMENT) * ALIGNMENT
        rooms = {far: self._room(nbytes, pinned=far) for far, nbytes in needed.items()}
        copies = []
        for part, start in zip(parts, starts, strict=True):
            room = rooms[is_far(part.data)][start : start + part.data.nbytes]
            data = room.view(part.data.dtype).view(part.data.shape).copy_(part.data, non_blocking=True)
            copies.append(replace(part, data=data))
        return copies

    def _room(self, nbytes: int, *, pinned: bool) -> Tensor:
        memory = self._memory.pop(pinned, None)
        if memory is None or memory.nbytes < nbytes:
            del memory  # before there is more
            memory = host_bytes(nbytes, pinned=pinned)
        self._memory[pinned] = memory
        return memory


def is_far(tensor: Tensor) -> bool:
    """Whether a device copies it by itself, to memory that is page-locked."""
    return tensor.device.type == "cuda"
