"""What autograd saves, kept in host memory and brought back just before backward needs it.

[Note: the order of blocks] What is saved is cut into blocks, numbered in the order of forward; backward comes by in the
reverse order. A block's tensors start for the host when they are saved, and leave the device when the next block saves
its first: the copies have one block's computing to hide behind. The last block's stay until their backward, which
comes next anyway. When backward asks for the first tensor of a block, those of the block before it start back, so
they have one block's backward to hide behind. Out of order (another graph's backward, a second one) it is only slower:
what is asked for and not there is copied back then.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zerolith.errors import UsageError
from zerolith.memory.lane import Lane, Parcel, alias, lane_for

AHEAD = 1  # blocks that are copied back before backward comes to them
MIN_BYTES = 64 * 1024  # below, to start a copy takes longer than the copy: 64 KiB are 3 us at 25 GB/s
CHANGED = (
    "a tensor of shape {} that backward needs was modified in place after it was saved; "
    "compute out of place there, or clone it first"
)


class Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A parameter itself: autograd holds it anyway. Of a result only an alias, or the graph would hold itself.
        self.tensor = tensor if tensor.is_leaf and tensor.requires_grad else alias(tensor)
        self.version = tensor._version

    def get(self) -> Tensor:
        """The tensor. Raises UsageError if it is not what it was."""
        if self.tensor._version != self.version:
            raise UsageError(CHANGED.format(tuple(self.tensor.shape)))
        return self.tensor if self.tensor.requires_grad else alias(self.tensor)


class Saved:
    """A saved tensor that is kept on the host."""

    __slots__ = ("block", "parcel", "shape")

    def __init__(self, block: Block, parcel: Parcel, shape: torch.Size) -> None:
        self.block, self.parcel, self.shape = block, parcel, shape

    def get(self) -> Tensor:
        """The tensor, back on its device. Raises UsageError if it changed on its way."""
        return self.block.offload._bring(self.block, self.parcel).expand(self.shape)


class Block:
    """What one part of a forward saves. It lives as long as anything of it may be asked for."""

    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        self.number = 0  # from 1, once it has saved something
        self._parcels: list[weakref.ref[Parcel]] = []

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which what autograd saves belongs to this block."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)

    def pack(self, tensor: Tensor) -> Kept | Saved:
        """Send a tensor to the host, if that frees memory worth the copy."""
        if not _is_movable(tensor):
            return Kept(tensor)
        bare = _without_repeats(tensor)
        if bare.nbytes < self.offload.min_bytes:
            return Kept(tensor)
        parcel = self.offload._send(self, bare)
        self._parcels.append(weakref.ref(parcel))
        return Saved(self, parcel, tensor.shape)

    def parcels(self) -> Iterator[Parcel]:
        """Those that may still be asked for."""
        for reference in self._parcels:
            parcel = reference()
            if parcel is not None:
                yield parcel


class Offload:
    """Keeps what autograd saves in host memory: `with offload.block().hooks(): y = layer(x)`.

    Parameters stay, for they are on the device anyway, and so does what is smaller than `min_bytes`.
    """

    def __init__(self, *, min_bytes: int = MIN_BYTES, make_lane: Callable[[torch.device], Lane] = lane_for) -> None:
        self.min_bytes = min_bytes
        self.lanes: dict[torch.device, Lane] = {}
        self._make_lane = make_lane
        self._numbers = itertools.count(1)
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._known: weakref.WeakValueDictionary[Hashable, Parcel] = weakref.WeakValueDictionary()
        self._filling = 0  # number of the block that saved last
        self._leaving: list[weakref.ref[Parcel]] = []  # what it sent
        self._reading = 0  # number of the block that backward is in, or was in last
        self._task = -1  # autograd's number of that backward

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or one that was pickled, gets one like this, without what is in it."""
        return partial(Offload, min_bytes=self.min_bytes, make_lane=self._make_lane), ()

    def block(self) -> Block:
        """A new block, after all others."""
        return Block(self)

    def drop_idle_memory(self) -> None:
        """Let the host memory go that waits for the next tensors."""
        for lane in self.lanes.values():
            lane.pool.clear()

    def _send(self, block: Block, tensor: Tensor) -> Parcel:
        if block.number == 0:
            block.number = next(self._numbers)
            self._blocks[block.number] = block
        if block.number != self._filling:
            self._depart()
            self._filling = block.number
        key = _key(tensor)
        parcel = self._known.get(key)
        if parcel is None:
            parcel = self._lane(tensor.device).to_host(tensor)
            parcel.home = block.number
            self._known[key] = parcel
            self._leaving.append(weakref.ref(parcel))
        parcel.num_saved += 1
        return parcel

    def _depart(self) -> None:
        """What an earlier block sent leaves the device."""
        for reference in self._leaving:
            parcel = reference()
            if parcel is not None and parcel.is_leaving:
                parcel.lane.let_go(parcel)
        self._leaving.clear()

    def _bring(self, block: Block, parcel: Parcel) -> Tensor:
        task = torch._C._current_graph_task_id()  # -1 outside of backward; there is no public way to ask
        if (block.number, task) != (self._reading, self._task):
            self._enter(block, task)
        tensor = parcel.lane.finish_back(parcel)
        if parcel.is_spoilt:
            raise UsageError(CHANGED.format(tuple(tensor.shape)))
        parcel.num_used += 1
        if parcel.num_used >= parcel.num_saved:
            parcel.lane.let_go(parcel)
        return tensor

    def _enter(self, block: Block, task: int) -> None:
        """Backward comes to `block`."""
        left, self._reading = self._reading, block.number
        for each in (block, *self._before(block)):
            for parcel in each.parcels():
                parcel.lane.start_back(parcel)
        if left != block.number:
            self._leave(left)
        last, self._task = self._task, task
        if task not in (-1, last):
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._leave(self._reading)
        for lane in self.lanes.values():
            lane.settle()

    def _leave(self, number: int) -> None:
        """What was brought for a block and not used goes, unless an earlier block saved it, too."""
        block = self._blocks.get(number)
        for parcel in block.parcels() if block is not None else ():
            if parcel.home == number:
                parcel.lane.let_go(parcel)

    def _before(self, block: Block) -> list[Block]:
        """The blocks that backward comes to next, as far as they are still needed."""
        numbers = sorted((number for number in list(self._blocks) if number < block.number), reverse=True)
        found = [self._blocks.get(number) for number in numbers[:AHEAD]]
        return [each for each in found if each is not None]

    def _lane(self, device: torch.device) -> Lane:
        if device not in self.lanes:
            self.lanes[device] = self._make_lane(device)
        return self.lanes[device]


def _unpack(packed: Kept | Saved) -> Tensor:
    return packed.get()


def _is_movable(tensor: Tensor) -> bool:
    """Whether a host copy would free the tensor's memory, and can be made by copying bytes."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_quantized or tensor.is_meta:
        return False
    base = tensor if tensor._base is None else tensor._base
    return not isinstance(base, nn.Parameter) and not (base.is_leaf and base.requires_grad)


def _without_repeats(tensor: Tensor) -> Tensor:
    """The tensor before `expand`: what repeats the same memory has size 1."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory, in the same state."""
    memory = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype)
    return (*memory, tensor.is_conj(), tensor.is_neg(), tensor._version)
