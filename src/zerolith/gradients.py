"""From autograd's gradients to the sum over ranks: collecting, accumulating and reducing.

[Note: late terms] A section is reduced when backward is done with its modules. A gradient that comes later rests until
the next reduction, or until the step, where ranks agree on the sections of which one of them has such a term.

[Note: one buffer for two] A term that rests and the sum that it becomes are never needed at once. At stage 0 the term
lies in the sum's buffer; at stage 1 the sum lies in the term's, where this rank's shard is.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, Pending, block_squares, done
from zerolith.departures import Departed, Departures
from zerolith.layout import BLOCK
from zerolith.parameter import refuse_away
from zerolith.partitioning import REPLICATE, SHARD, Partitioning
from zerolith.precision import Precision
from zerolith.redistribute import Then, redistribute
from zerolith.schedule import Sequencer
from zerolith.section import Section
from zerolith.term import Term


class Gradients:
    """Owner of one section's terms and of what is known about their sum since the last step."""

    def __init__(self, section: Section, partitioning: Partitioning, precision: Precision, comm: Comm) -> None:
        assert section.grads is not None, "a frozen section has no gradients"
        self.section = section
        self.partitioning = partitioning
        self.comm = comm
        dtype = section.members[0].param.dtype
        self.wire_dtype = precision.reduce_dtype(dtype)
        self.rest_dtype = section.grads.data.dtype
        self.predivide = precision.predivide
        self.term: Term | None = None
        self.used = [False] * len(section.members)  # got a gradient on this rank since the last step
        self.fresh = True  # `sum` holds nothing yet
        self.gathered = partitioning.optim is SHARD  # `sum` is in the optim placement
        self._buffer = section.grads  # without memory until it is needed
        self._lender: Term | None = None  # holds `sum` instead of `_buffer`
        self.left: Departed | None = None  # holds `sum`, on the host
        self.is_away = False  # lent: without memory, and not to be touched
        self.runs_behind = False  # whether the section is updated behind the forward that follows a step
        self.is_held = False  # an update that runs behind reads them, and resets them afterwards
        self._squares: Tensor | None = None  # see `squares`

    @property
    def sum(self) -> FlatBuffer:
        """The sum over ranks and micro-batches since the last step, in the optim placement at the boundary."""
        if self.is_away:
            refuse_away()
        if self.left is not None:
            return self.left.arrived()
        if self._lender is not None:
            return self._lender.buffer.own()
        if not self._buffer.is_allocated:
            self._buffer.allocate()
            self._buffer.data.zero_()
        return self._buffer

    @property
    def squares(self) -> Tensor:
        """(blocks of this rank's shard,) fp64: the square sums of those of `sum`. Does not wait for the device."""
        if self._squares is None:
            self._squares = block_squares(self.sum.own().data)
        return self._squares

    def held(self) -> list[Tensor]:
        """What is in memory of the gradients since the last step."""
        terms = [term.buffer.data for term in (self.term, self._lender) if term is not None]
        return [*terms, *([self._buffer.data] if self._buffer.is_allocated else [])]

    def to_restore(self) -> FlatBuffer:
        """This rank's shard of `sum`, zeros, to be filled with what an earlier run had reduced since its last step."""
        self.fresh = False
        self.gathered = self.partitioning.optim is SHARD
        self.edited()
        return self.sum.own()

    def _to_overwrite(self) -> FlatBuffer:
        """`sum` on its device, with undefined contents if it has no memory yet."""
        if self.left is not None:
            self._bring_back(self.left)
        if self._lender is None and not self._buffer.is_allocated:
            self._buffer.allocate()
        return self.sum

    def collect(self, index: int, grad: Tensor, *, reducing: bool) -> None:
        """Take one parameter's gradient of this backward."""
        self.used[index] = True
        if self.term is None and reducing and self._is_whole_term(grad):
            self.term = Term.borrow(self.section, self.comm, grad)
            return
        if self.term is None or self.term.borrowed:
            earlier, self.term = self.term, self._new_term(self.wire_dtype if reducing else self.rest_dtype)
            self.term.rests = not reducing
            if earlier is not None:
                self.term.add(index, earlier.buffer.slot(index))
        self.term.add(index, grad)

    def start_reduce(self, *, completes: bool) -> Pending:
        """Begin to add this term, summed over ranks, to the rest gradients. Collective, also without a term.

        `completes` says whether the step's sum is expected to be complete then: its squares are taken on the way.
        """
        term = self.term or self._new_term(self.wire_dtype)
        term.complete()
        self.term, fresh = None, self.fresh
        if fresh and term.rests and term.pooled and not self._buffer.is_allocated:
            self._lender = term
        self.fresh = False
        self.gathered = self.partitioning.optim is SHARD
        if self.predivide != 1.0:
            term.buffer.data.div_(self.predivide)
        sent = self._to_wire(term)
        name = f"{self.section.name}.grad"
        into = self._to_overwrite().own()
        self._squares = into.data.new_empty(into.data.numel() // BLOCK, dtype=torch.float64) if completes else None
        pending = redistribute(sent.buffer, into, comm=self.comm, name=name, fresh=fresh, squares=self._squares)
        return pending if sent is self._lender else Then(pending, sent.give_back)

    def keep_late(self) -> None:
        """Let a term that came after the section was reduced rest until the next reduction."""
        late = self.term
        if late is not None and not late.rests:
            self.term = Term.take(self.section, self.comm, self.rest_dtype)
            self.term.rests = True
            for index, filled in enumerate(late.filled):
                if filled:
                    self.term.add(index, late.buffer.slot(index))
            late.give_back()

    def start_finish(self) -> Pending:
        """Begin to bring the sum to the optim placement, if it is not there. Collective."""
        if self.fresh:
            self.sum.data.zero_()
        elif not self.gathered:
            self.gathered = True
            return redistribute(self.sum.own(), self.sum, comm=self.comm, name=f"{self.section.name}.grad")
        return done()

    def scale(self, factor: float) -> None:
        """For a step, which knows the squares of the sum before; its updates may run beside whoever reads them."""
        if factor != 1.0:
            self.sum.data.mul_(factor)

    def edited(self) -> None:
        """`sum` is another one than what was reduced."""
        self._squares = None

    def rescale(self, factor: float) -> None:
        """Multiply all that has come since the last step, reduced or not."""
        if factor != 1.0 and not self.fresh:
            self.scale(factor)
            self.edited()
        if factor != 1.0 and self.term is not None:
            self.term.buffer.data.mul_(factor)

    def leave(self, departures: Departures) -> None:
        """Begin to send this rank's shard of `sum` to the host; its squares are taken here, before."""
        self._squares = self.squares
        self.left = departures.send(self.sum.own(), free=self.free_here)

    def free(self) -> None:
        """Give the memory of the sum back, unless a term lends it; `reset` must come before anything else."""
        if self.left is not None:
            self.left.arrived()  # a rank with none of the elements has not read it, and threads have other streams
            self.left.leave_behind()
        self._buffer.release()

    def free_here(self, departed: Departed) -> None:
        """Give the memory back that the sum had on its device, if it is still `departed` that holds it."""
        if self.left is departed:
            self._free_here()

    def _free_here(self) -> None:
        if self._lender is not None:
            self._lender.give_back()
            self._lender = None
        self._buffer.release()

    def _bring_back(self, left: Departed) -> None:
        """Something is to be added to a sum that has left."""
        there = left.arrived()
        self._free_here()
        self.left = self._squares = None
        self._buffer.allocate()
        self._buffer.own().data.copy_(there.data)
        left.give_back()

    def reset(self) -> None:
        """Forget everything since the last step."""
        for term in (self.term, self._lender):
            if term is not None:
                term.give_back()
        if self.left is not None:
            self.left.give_back()
        self.term = self._lender = self.left = self._squares = None
        self.used = [False] * len(self.used)
        self.fresh = True
        self.gathered = self.partitioning.optim is SHARD
        self._buffer.release()

    def _is_whole_term(self, grad: Tensor) -> bool:
        fills = grad.numel() == self.section.layout.numel and grad.dtype == self.wire_dtype and self.predivide == 1.0
        return fills and type(grad) is Tensor and grad.layout is torch.strided and grad.is_contiguous()

    def _new_term(self, dtype: torch.dtype) -> Term:
        if self.fresh and dtype == self.rest_dtype and self.partitioning.optim is REPLICATE:
            return Term(self.section, self.comm, self._to_overwrite().data, pooled=False)
        return Term.take(self.section, self.comm, dtype)

    def _to_wire(self, term: Term) -> Term:
        """`term` in the wire dtype; if that is another one, `term` is given up unless `sum` lies in it."""
        if term.buffer.data.dtype == self.wire_dtype:
            return term
        sent = Term.take(self.section, self.comm, self.wire_dtype)
        sent.buffer.data.copy_(term.buffer.data)
        if term is not self._lender:
            term.give_back()
        return sent


class Reducer:
    """Collects gradients from autograd's hooks and reduces section by section behind backward, in one order.

    At most one reduction is in flight: then the memory is that of one unit's gradients and one in transit.
    """

    def __init__(self, gradients: Sequence[Gradients], comm: Comm, *, overlap: bool) -> None:
        self.gradients = list(gradients)
        self.comm = comm
        self.overlap = overlap
        self.reducing = False  # whether this backward reduces
        self._completes = False  # and whether that is expected to complete a step's sums
        self.partial = False  # whether some rank's terms wait to be reduced
        self.before_first: Callable[[], None] = lambda: None  # told of every gradient before it is taken
        self.when_summed: Callable[[Gradients], None] = lambda own: None  # told of every reduction that is done
        self._sequence = Sequencer(len(self.gradients))
        self._follows = False  # whether the sequence is that of a backward that was seen
        self._in_flight: deque[tuple[Gradients, Pending]] = deque()
        self._gathers: list[Pending] = []  # of sums that are complete, behind what is left of backward
        hooked = [
            _hook(member.param, self._collector(number, index))
            for number, own in enumerate(self.gradients)
            for index, member in enumerate(own.section.members)
        ]
        self._handles = [handle for handle, _ in hooked]
        self._leaves = [leaf for _, leaf in hooked]  # autograd's nodes that accumulate

    def begin(self, *, reducing: bool, completes: bool = False) -> None:
        """A backward begins; `reducing` says whether its gradients leave now. The same on all ranks.

        `completes`: no other backward is expected before the step.
        """
        self.wait_for_gathers()  # what is being gathered may get another term
        self.reducing, self._completes = reducing, completes
        self._sequence.restart()

    def ready(self, number: int) -> None:
        """This backward is done with the section: reduce it, unless others must go first. Collective."""
        if self.reducing:
            for each in self._sequence.ready(number):
                self._launch(each)

    def end(self) -> None:
        """A backward is over: reduce what it left. Collective if it reduces."""
        if not self.reducing:
            self.partial = True
            return
        self._reduce_rest()
        if not self._follows:
            self._learn_order()

    def flush(self, *, completes: bool = False) -> None:
        """Reduce what rests. Collective. `completes`: see `begin`."""
        if self.partial:
            self.begin(reducing=True, completes=completes)
            self._reduce_rest()

    def _reduce_rest(self) -> None:
        for number in self._sequence.rest():
            self._launch(number)
        self.wait()
        self.partial = self.reducing = False
        for own in self.gradients:
            own.keep_late()

    def finish(self, late: Sequence[bool] = ()) -> None:
        """Bring every sum to the optim placement. Collective.

        `late`, the same on all ranks: whose late terms are reduced before (see [Note: late terms]). A module that runs
        in two parts of reentrant checkpointing leaves one, or a parameter that is used outside its module.
        """
        self.flush(completes=True)
        self._completes = True
        for number, is_late in enumerate(late):
            if is_late:
                self.wait()
                self.wait_for_gathers()  # its first sum may be on its way
                self._launch(number)
        self.wait()
        self._gathers += [own.start_finish() for own in self.gradients]
        self.wait_for_gathers()

    def late(self) -> list[bool]:
        """Of which sections this rank has a term that was not reduced with the others'."""
        return [own.term is not None for own in self.gradients]

    def finish_late(self) -> None:
        """Finish what came late on any rank, if all else is reduced. Collective."""
        late = self.comm.max([float(flag) for flag in self.late()], name="late gradients")
        if any(late):
            self.finish([flag > 0 for flag in late])

    def will_collect(self) -> bool:
        """Whether the backward that runs on this thread brings gradients here: autograd.grad does not."""
        try:
            return any(map(torch._C._will_engine_execute_node, self._leaves))
        except RuntimeError:  # it is the gradient of parameters that autograd.grad was asked for
            return False

    def wait(self) -> None:
        """Let the reduction in flight end."""
        while self._in_flight:
            own, pending = self._in_flight.popleft()
            pending.wait()
            if own.partitioning.rests_partial:  # until the last micro-batch: this is the whole step's sum
                self._gathers.append(own.start_finish())
            self.when_summed(own)

    def reset(self) -> None:
        """Drop everything; after an exception the collectives in flight are waited for first."""
        while self._in_flight:
            self._in_flight.popleft()[1].wait()
        self.wait_for_gathers()
        for own in self.gradients:
            if not own.is_held:
                own.reset()
        self.partial = self.reducing = False
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
                with torch.no_grad():
                    reducer.gradients[number].collect(index, grad, reducing=reducer.reducing)

        return collect

    def _launch(self, number: int) -> None:
        self.wait()
        with torch.no_grad():
            own = self.gradients[number]
            self._in_flight.append((own, own.start_reduce(completes=self._completes)))
        if not self.overlap:
            self.wait()

    def wait_for_gathers(self) -> None:
        """Let the sums that are on their way to the optim placement arrive."""
        while self._gathers:
            self._gathers.pop().wait()

    def _learn_order(self) -> None:
        """Follow from now on the order in which this backward was done with sections on rank 0. Collective."""
        self._follows = True
        order = torch.tensor(self._sequence.observed(), device=self.comm.device)
        self.comm.broadcast(order, name="order of reduction")
        self._sequence.follow(order.tolist())


def _hook(param: Tensor, hook: Callable[[Tensor], None]) -> tuple[Any, Node]:  # Any: torch's RemovableHandle
    """Register `hook` for when `param.grad` is there, also on a parameter that is frozen for now; its node, too."""
    wanted_grad = param.requires_grad
    handle = param.requires_grad_(True).register_post_accumulate_grad_hook(hook)
    leaf = get_gradient_edge(param).node
    param.requires_grad_(wanted_grad)
    return handle, leaf
