"""What one rank's backward makes of a section's gradient.

[Note: terms] A section's Term is this rank's own gradient, PARTIAL: one flat tensor that collects what backward
produces. Where gradients are reduced at this backward it is in the wire dtype and goes at once; where they rest
(stages 0 and 1 before the boundary, no_sync at any stage) it is in the accumulation dtype and stays.

[Note: borrowed terms] Where one tensor fills a section and its gradient leaves at once, the gradient is the term: it is
read by the reduction and written by nobody, for autograd may share its memory with others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, add_into
from zerolith.partitioning import PARTIAL
from zerolith.section import Section


class Term:
    """One section's PARTIAL gradient in `data`; `filled` says which slots have been written."""

    def __init__(self, section: Section, comm: Comm, data: Tensor, *, pooled: bool) -> None:
        self.comm = comm
        self.pooled = pooled  # whether `data` goes back to the pool
        self.borrowed = False  # whether `data` is autograd's, to be read only
        self.rests = False  # whether it was begun by a backward that does not reduce
        self.buffer = FlatBuffer(section.layout, PARTIAL, data, rank=comm.rank)
        self.filled = [False] * len(section.members)
        self.buffer.zero_gaps()

    @classmethod
    def take(cls, section: Section, comm: Comm, dtype: torch.dtype) -> Term:
        """A term in memory of the pool."""
        data = comm.pool.take(section.layout.numel, dtype=dtype, device=comm.device)
        return cls(section, comm, data, pooled=True)

    @classmethod
    def borrow(cls, section: Section, comm: Comm, grad: Tensor) -> Term:
        """A term that is the gradient of the section's only parameter."""
        term = cls(section, comm, grad.view(-1), pooled=False)
        term.borrowed, term.filled = True, [True]
        return term

    def add(self, index: int, grad: Tensor) -> None:
        """Add parameter `index`'s gradient of any strides."""
        grad = grad.to_dense() if grad.is_sparse else grad
        if self.filled[index]:
            add_into(self.buffer.slot(index).view(-1), [grad.reshape(-1)], fresh=False)
        else:
            self.buffer.slot(index).copy_(grad)
            self.filled[index] = True

    def complete(self) -> None:
        """Write zeros where no gradient came."""
        for index, filled in enumerate(self.filled):
            if not filled:
                self.buffer.slot(index).zero_()

    def give_back(self) -> None:
        if self.pooled:
            self.comm.pool.give(self.buffer.data)
