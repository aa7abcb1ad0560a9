"""The way of tensors between a device and host memory, there and back. Knows nothing of who sends them, or when.

[Note: who waits for a copy] Copies to and from a CUDA device run on one stream beside the stream that computes. A copy
starts when all that the compute stream was given before is done. The allocator is told nothing of that second stream
(Tensor.record_stream): memory would come back late and at odd moments. Instead the lane holds on to device memory that
a copy reads or writes until the compute stream has waited for that copy, or the copy is known to be done; the compute
stream can use it again at once. Host buffers need no waiting, for only copies on the one stream touch them. All this
is for one compute stream on each device: forward's, which autograd makes backward's, too.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from zerolith.memory.pool import HostPool

Copy = Any  # what a Copier says of a copy under way: its event, or None


class Copier(Protocol):
    """How bytes move between a device and the host."""

    @property
    def needs_pinned(self) -> bool:
        """Whether host memory has to be page-locked for it."""

    def start(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy, after what the device was given to compute before."""

    def wait(self, copy: Copy) -> None:
        """What the device is given to compute from now on runs after this copy."""

    def finish(self, copy: Copy) -> None:
        """Wait until this copy has come to its end."""

    def is_done(self, copy: Copy) -> bool:
        """Whether the copy has come to its end. Does not wait."""


class AtOnce:
    """Copies that are done when they are asked for: on the CPU, where the host is the device."""

    needs_pinned = False

    def start(self, target: Tensor, source: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, copy: None) -> None:
        """Nothing: it is done."""

    finish = wait

    def is_done(self, copy: None) -> bool:
        """Yes."""
        return True


class Beside:
    """Copies on a CUDA stream of their own, beside what computes; see [Note: who waits for a copy]."""

    needs_pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Begin to copy when what computes now is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        """The stream that computes waits; this process does not."""
        torch.cuda.current_stream(self.device).wait_event(copy)

    def finish(self, copy: torch.cuda.Event) -> None:
        """This process waits."""
        copy.synchronize()

    def is_done(self, copy: torch.cuda.Event) -> bool:
        """Whether the copy's event has come."""
        return copy.query()


class Parcel:
    """A tensor's copy on the host, and the tensor on its device while it is there: before it leaves, or come back.

    Whoever lets the last reference go gives the host buffer back to its pool.
    """

    __slots__ = ("__weakref__", "copy", "here", "home", "host", "is_leaving", "is_spoilt", "lane", "num_saved",
                 "num_used", "origin", "version")  # fmt: skip

    def __init__(self, lane: Lane, host: Tensor, original: Tensor, copy: Copy) -> None:
        self.lane = lane
        self.host = host
        self.here: Tensor | None = original  # on the device
        self.copy = copy  # the last one, from or to `here`
        self.is_leaving = True  # `here` is still the original
        self.is_spoilt = False  # the original was changed before it left
        self.version = original._version
        self.origin = StorageWeakRef(original.untyped_storage())  # while it lives, no other storage has its address
        self.home = 0  # number of the first block that saved it
        self.num_saved = self.num_used = 0  # how often it was saved, and asked for since it was last let go


class Lane:
    """Sends the tensors of one device to host memory and back."""

    def __init__(self, device: torch.device, copier: Copier) -> None:
        self.device = device
        self.copier = copier
        self.pool = HostPool(pinned=copier.needs_pinned)
        self._in_flight: list[tuple[Copy, Tensor]] = []  # device memory in use by copies, which may outlive parcels

    def to_host(self, tensor: Tensor) -> Parcel:
        """Begin to copy `tensor` into host memory. The parcel holds on to the original until `let_go`."""
        original = alias(tensor)
        dense = torch.empty_like(original, device="meta")  # the same strides, but for gaps
        buffer = self.pool.take(dense.nbytes)
        host = buffer.view(dense.dtype).as_strided(dense.size(), dense.stride())
        parcel = Parcel(self, host, original, self._start(host, original, on_device=original))
        weakref.finalize(parcel, self.pool.give_back, buffer).atexit = False
        return parcel

    def start_back(self, parcel: Parcel) -> None:
        """Begin to copy it back, unless it is there or on its way."""
        if parcel.here is not None:
            return
        host = parcel.host
        parcel.here = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=self.device)
        parcel.copy = self._start(parcel.here, host, on_device=parcel.here)

    def finish_back(self, parcel: Parcel) -> Tensor:
        """The tensor on its device, for what is computed next."""
        self.start_back(parcel)
        assert parcel.here is not None, "start_back() gives a parcel its tensor"
        self._wait(parcel)
        return alias(parcel.here)

    def let_go(self, parcel: Parcel) -> None:
        """Drop the tensor on the device; the host copy stays."""
        if parcel.here is None:
            return
        self._wait(parcel)
        parcel.here = None
        parcel.is_leaving = False
        parcel.num_used = 0

    def settle(self) -> None:
        """Let go of device memory that copies still use for parcels that are gone."""
        for copy, _ in self._in_flight:
            self.copier.wait(copy)
        self._in_flight = []

    def _start(self, target: Tensor, source: Tensor, *, on_device: Tensor) -> Copy:
        copy = self.copier.start(target, source)
        self._in_flight.append((copy, on_device))
        while self._in_flight and self.copier.is_done(self._in_flight[0][0]):  # they come to their ends in order
            del self._in_flight[0]
        return copy

    def _wait(self, parcel: Parcel) -> None:
        """Have all that is computed from now on run after the parcel's copy."""
        self.copier.wait(parcel.copy)
        self._in_flight = [each for each in self._in_flight if each[1] is not parcel.here]
        if parcel.is_leaving and parcel.here is not None:
            parcel.is_spoilt |= parcel.here._version != parcel.version


def lane_for(device: torch.device) -> Lane:
    """A lane for the tensors of `device`."""
    return Lane(device, Beside(device) if device.type == "cuda" else AtOnce())


def alias(tensor: Tensor) -> Tensor:
    """The same memory without its history; it counts the same changes, made inside of a dispatch mode or outside."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()
