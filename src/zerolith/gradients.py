"""From autograd's gradients to the sum over ranks: collecting, accumulating and reducing.

[Note: terms] A section's Term is this rank's own gradient, PARTIAL: one flat tensor that collects what backward
produces. Where gradients are reduced at this backward it is in the wire dtype and goes at once; where they rest
(stages 0 and 1 before the boundary, no_sync at any stage) it is in the accumulation dtype and stays.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, Pending, add_into, done
from zerolith.partitioning import PARTIAL, SHARD, Partitioning
from zerolith.precision import Precision
from zerolith.redistribute import redistribute
from zerolith.schedule import Sequencer
from zerolith.section import Section


class Term:
    """One section's PARTIAL gradient; `filled` says which slots have been written."""

    def __init__(self, section: Section, comm: Comm, dtype: torch.dtype) -> None:
        self.comm = comm
        data = comm.pool.take(section.layout.numel, dtype=dtype, device=comm.device)
        self.buffer = FlatBuffer(section.layout, PARTIAL, data, rank=comm.rank)
        self.filled = [False] * len(section.members)
        for gap in section.layout.gaps():
            self.buffer.at(gap).zero_()

    def add(self, index: int, grad: Tensor) -> None:
        """Add parameter `index`'s gradient of any strides."""
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
                self.filled[index] = True

    def cast(self, section: Section, dtype: torch.dtype) -> Term:
        """This term in `dtype`; if that is another one, this term is given up."""
        if dtype == self.buffer.data.dtype:
            return self
        other = Term(section, self.comm, dtype)
        other.buffer.data.copy_(self.buffer.data)
        other.filled = self.filled
        self.give_back()
        return other

    def give_back(self) -> None:
        self.comm.pool.give(self.buffer.data)


class Gradients:
    """Owner of one section's terms and of what is known about its `grads` buffer since the last step."""

    def __init__(self, section: Section, partitioning: Partitioning, precision: Precision, comm: Comm) -> None:
        assert section.grads is not None, "a frozen section has no gradients"
        self.section = section
        self.sum = section.grads
        self.partitioning = partitioning
        self.comm = comm
        dtype = section.members[0].param.dtype
        self.wire_dtype = precision.reduce_dtype(dtype)
        self.rest_dtype = self.sum.data.dtype
        self.term: Term | None = None
        self.arrived: set[int] = set()  # in this backward
        self.used = [False] * len(section.members)  # got a gradient on this rank since the last step
        self.fresh = True  # `sum` holds nothing yet
        self.gathered = partitioning.optim is SHARD  # `sum` is in the optim placement

    def collect(self, index: int, grad: Tensor, *, reducing: bool) -> bool:
        """Take one parameter's gradient; returns whether every trained parameter has had one in this backward."""
        if self.term is None:
            self.term = Term(self.section, self.comm, self.wire_dtype if reducing else self.rest_dtype)
        self.term.add(index, grad)
        self.arrived.add(index)
        self.used[index] = True
        return len(self.arrived) == len(self.section.members)

    def start_reduce(self) -> Pending:
        """Begin to add this term, summed over ranks, to the rest gradients. Collective, also without a term."""
        term = self.term or Term(self.section, self.comm, self.wire_dtype)
        term.complete()
        term = term.cast(self.section, self.wire_dtype)
        self.term, fresh = None, self.fresh
        self.fresh = False
        target = self.sum.own()
        pending = redistribute(term.buffer, target, comm=self.comm, name=f"{self.section.name}.grad", fresh=fresh)
        self.gathered = self.partitioning.optim is SHARD
        return _Reduced(pending, term)

    def start_finish(self) -> Pending:
        """Begin to bring the sum to the optim placement, if it is not there. Collective."""
        if self.fresh:
            self.sum.data.zero_()
        elif not self.gathered:
            self.gathered = True
            return redistribute(self.sum.own(), self.sum, comm=self.comm, name=f"{self.section.name}.grad")
        return done()

    def scale(self, factor: float) -> None:
        if factor != 1.0:
            self.sum.data.mul_(factor)

    def reset(self) -> None:
        """Forget everything since the last step."""
        if self.term is not None:
            self.term.give_back()
        self.term = None
        self.arrived.clear()
        self.used = [False] * len(self.used)
        self.fresh = True
        self.gathered = self.partitioning.optim is SHARD


class _Reduced:
    def __init__(self, pending: Pending, term: Term) -> None:
        self._pending = pending
        self._term = term

    def wait(self) -> None:
        self._pending.wait()
        self._term.give_back()


class Reducer:
    """Collects gradients from autograd's hooks and reduces section by section, in reverse order, behind backward.

    At most one reduction is in flight: then the memory is that of one unit's gradients and one in transit.
    """

    def __init__(self, gradients: Sequence[Gradients], *, overlap: bool) -> None:
        self.gradients = list(gradients)  # in the order of reduction
        self.overlap = overlap
        self.reducing = False  # whether this backward reduces
        self.partial = False  # whether some rank's terms wait to be reduced
        self._sequence = Sequencer(len(self.gradients))
        self._in_flight: deque[Pending] = deque()
        self.before_first: Callable[[], None] = lambda: None  # told of every gradient before it is taken
        self._handles = [
            _hook(member.param, self._collector(number, index))
            for number, own in enumerate(self.gradients)
            for index, member in enumerate(own.section.members)
        ]

    def begin(self, *, reducing: bool) -> None:
        """A backward begins; `reducing` says whether its gradients leave now. The same on all ranks."""
        self.reducing = reducing
        self._sequence.restart()
        for own in self.gradients:
            own.arrived.clear()

    def end(self) -> None:
        """A backward is over: reduce what it left. Collective if it reduces."""
        if not self.reducing:
            self.partial = True
            return
        for number in self._sequence.rest():
            self._launch(number)
        for number, own in enumerate(self.gradients):
            # A parameter that fires twice in one backward (reentrant checkpointing) leaves a second term. That is
            # so on every rank, since all of them run the same modules.
            if own.term is not None:
                self._launch(number)
        self.wait()
        self.partial = False

    def flush(self) -> None:
        """Reduce what rests. Collective."""
        if self.partial:
            self.begin(reducing=True)
            self.end()

    def finish(self) -> None:
        """Bring every sum to the optim placement. Collective."""
        self.flush()
        for pending in [own.start_finish() for own in self.gradients]:
            pending.wait()

    def wait(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().wait()

    def reset(self) -> None:
        """Drop everything; after an exception the collectives in flight are waited for first."""
        self.wait()
        for own in self.gradients:
            own.reset()
        self.partial = False
        self._sequence.restart()

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _collector(self, number: int, index: int) -> Callable[[Tensor], None]:
        reference = weakref.ref(self)

        def collect(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            reducer = reference()
            if grad is not None and reducer is not None:
                reducer.before_first()
                reducer._on_grad(number, index, grad)

        return collect

    @torch.no_grad()
    def _on_grad(self, number: int, index: int, grad: Tensor) -> None:
        complete = self.gradients[number].collect(index, grad, reducing=self.reducing)
        if complete and self.reducing and not self._sequence.has_gone(number):
            for ready in self._sequence.ready(number):
                self._launch(ready)

    def _launch(self, number: int) -> None:
        self.wait()
        with torch.no_grad():
            self._in_flight.append(self.gradients[number].start_reduce())
        if not self.overlap:
            self.wait()



def _hook(param: Tensor, hook: Callable[[Tensor], None]) -> Any:  # torch's RemovableHandle
    """Register `hook` for when `param.grad` is there; also on a parameter that is frozen for now."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    handle = param.register_post_accumulate_grad_hook(hook)
    if frozen:
        param.requires_grad_(False)
    return handle
