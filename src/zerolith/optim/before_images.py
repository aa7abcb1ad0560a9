"""Masters and states as they were before an update, so that it can be taken back, to the bit.

[Note: before images] An update that begins in backward may turn out to be another one than the step's: the norm of all
gradients says that they are clipped, or one of them is not finite. Adam's update has no exact inverse in floating
point, so what it is about to write is copied first (a database calls that a before image). The copies cost a section's
masters and states once more, in host memory that is kept for the next step's; a section for which there is no room is
not updated before the step. Gradients are kept as they are: our kernels only read them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from threading import Lock

import torch
from torch import Tensor, nn

from zerolith.comm import ranks_on_this_host
from zerolith.errors import OffloadError
from zerolith.gradients import Gradients
from zerolith.memory import memory_of_host
from zerolith.memory.pool import HostPool
from zerolith.optim.holdings import Holdings
from zerolith.optim.one_pass import OnePass
from zerolith.optim.pieces import State

logger = logging.getLogger("zerolith")

SHARE = 0.5  # of the host's free memory, that of all its ranks together
ALIGNMENT = 64  # bytes


class BeforeImage:
    """One section's, which another thread may `fill` meanwhile."""

    def __init__(self, states: Mapping[nn.Parameter, State], memory: Tensor, pool: HostPool) -> None:
        self._states = {param: dict(state) for param, state in states.items()}  # the values stay the same objects
        self._memory: Tensor | None = memory
        self._pool = pool
        self._is_filled = False
        self._is_cancelled = False
        self._lock = Lock()

    def fill(self) -> bool:
        """Copy what is there, unless nobody needs it any more; returns whether the update is still wanted."""
        with self._lock:
            if self._memory is not None and not self._is_cancelled:
                for source, copy in self._pairs(self._memory):
                    copy.copy_(source)
                self._is_filled = True
            return not self._is_cancelled

    def cancel(self) -> None:
        """The update is not wanted: it is not to begin, and `restore` follows if it has."""
        with self._lock:
            self._is_cancelled = True

    def restore(self, states: MutableMapping[Tensor, State]) -> None:
        """Bring all of it back, if anything was copied; `states` are the optimizer's."""
        with self._lock:
            if self._memory is not None and self._is_filled:
                for source, copy in self._pairs(self._memory):
                    source.copy_(copy)
                for param, before in self._states.items():
                    if before:
                        states[param] = before
                    else:
                        states.pop(param, None)
        self.drop()

    def drop(self) -> None:
        """Nobody needs it any more."""
        with self._lock:
            if self._memory is not None:
                self._pool.give_back(self._memory)
                self._memory = None

    def _pairs(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for tensor in _tensors(self._states):
            yield tensor, memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _room(tensor)


class BeforeImages:
    """Owner of the memory for those of all sections of `holdings`."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._pool = HostPool(pinned=False)  # the same sizes come in every step
        self._room: int | None = None  # bytes; what is free is seen when the first is made

    def can_have(self, own: Gradients) -> bool:
        """Whether updates of a section may be taken back: our kernels step it in host memory, where it stays."""
        main, holdings = own.section.main, self._holdings
        is_here = main is not None and main.data.device.type == "cpu" and not holdings.residency.swaps(own)
        return is_here and isinstance(holdings.inner, OnePass)

    def make(self, own: Gradients) -> BeforeImage | None:
        """Room for one; None if there is none, or gradients would not be kept as they are."""
        inner, pieces = self._holdings.inner, self._holdings.pieces[own]
        knows = isinstance(inner, OnePass) and all(
            inner.knows(piece.param, inner.param_groups[piece.group]) for piece in pieces
        )
        if not knows or not self.can_have(own):
            return None
        states = {piece.param: inner.state.get(piece.param, {}) for piece in pieces}
        nbytes = sum(map(_room, _tensors(states)))
        if self._room is None:
            self._room = _room_on_host(self._holdings.comm.size)
        if self._pool.used_bytes + nbytes > self._room:
            return None
        try:
            return BeforeImage(states, self._pool.take(nbytes), self._pool)
        except OffloadError as error:
            logger.warning("an update waits for its step, for it could not be taken back: %s", error)
            self._room = self._pool.used_bytes
            return None


def _tensors(states: Mapping[nn.Parameter, State]) -> Iterator[Tensor]:
    for param, state in states.items():
        yield param.detach()
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _room_on_host(ranks: int) -> int:
    """Bytes that this rank may take of what is free on the host now; `ranks` are here if no launcher says how many."""
    memory = memory_of_host()
    return int(SHARE * memory[1]) // ranks_on_this_host(ranks) if memory is not None else torch.iinfo(torch.int64).max
