"""One contiguous tensor that holds this rank's part of a Layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zerolith.layout import Layout, Range
from zerolith.memory.pages import ask_for_huge_pages
from zerolith.partitioning import SHARD, Placement


class FlatBuffer:
    """Content of a layout at rest in one placement.

    data: (layout.numel,) when REPLICATE or PARTIAL, (layout.shard_numel,) when SHARD.
    """

    def __init__(self, layout: Layout, placement: Placement, data: Tensor, *, rank: int) -> None:
        self.layout = layout
        self.placement = placement
        self.rank = rank
        self.range = layout.shard(rank) if placement is SHARD else layout.whole
        self.data = data

    @classmethod
    def empty(
        cls, layout: Layout, placement: Placement, *, rank: int, dtype: torch.dtype, device: torch.device
    ) -> FlatBuffer:
        """A buffer with undefined content."""
        numel = layout.shard_numel if placement is SHARD else layout.numel
        return cls(layout, placement, torch.empty(numel, dtype=dtype, device=device), rank=rank)

    def at(self, elements: Range) -> Tensor:
        """(elements.numel,) view of a range of the layout that lies inside this buffer."""
        return self.data[elements.start - self.range.start : elements.stop - self.range.start]

    def slot(self, index: int) -> Tensor:
        """The whole tensor `index`, in its shape, as a view; not for SHARD buffers."""
        slot = self.layout.slots[index]
        return self.at(slot.span).view(slot.shape)

    def local(self, index: int) -> Tensor:
        """The flat part of tensor `index` that this buffer holds, as a view; possibly empty."""
        return self.at(self.layout.slots[index].span.clip(self.range))

    def own(self) -> FlatBuffer:
        """This rank's shard as a SHARD buffer over the same memory."""
        if self.placement is SHARD:
            return self
        return FlatBuffer(self.layout, SHARD, self.at(self.layout.shard(self.rank)), rank=self.rank)

    def zero_gaps(self) -> None:
        """Write zeros where no tensor lies; not for SHARD buffers."""
        for gap in self.layout.gaps():
            self.at(gap).zero_()

    def copy(self, placement: Placement, dtype: torch.dtype, *, device: torch.device | None = None) -> FlatBuffer:
        """What SHARD, or this buffer's own placement, keeps of it: in `dtype` and in memory of its own."""
        source = self.own() if placement is SHARD else self
        return FlatBuffer(self.layout, placement, source.data.to(device, dtype, copy=True), rank=self.rank)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in this buffer's memory."""
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided  # others have no storage
        return is_plain and tensor.untyped_storage()._cdata == self.data.untyped_storage()._cdata

    def shares_memory_with(self, other: FlatBuffer) -> bool:
        return self.holds(other.data)

    @property
    def is_allocated(self) -> bool:
        return self.data.untyped_storage().nbytes() > 0

    def allocate(self) -> None:
        """Give `data` storage again after `release`; every view of it is back, with undefined content."""
        if not self.is_allocated:  # to be resized would move it, and copy what is there
            self.data.untyped_storage().resize_(self.data.nbytes)
            if self.data.device.type == "cpu":
                ask_for_huge_pages(self.data.data_ptr(), self.data.nbytes)

    def release(self) -> None:
        """Free the storage of `data` but keep every view of it alive, those that autograd saved too."""
        self.data.untyped_storage().resize_(0)
