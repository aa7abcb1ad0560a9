"""Following modules through forward and backward, by hooks on the modules themselves.

A unit is gathered before its module runs, released after it, gathered again before its backward and released after
that; forward's last one stays, for backward begins with it, and units may be told to stay longer (see unit.Until). The
next unit's gather starts while this one computes.

[Note: release by phase] A forward that runs inside a backward (activation checkpointing recomputes) does not
release: only backward may, because the recomputed tensors are about to be used. So both nestings of
checkpointing and units work.

[Note: when a backward is over] Autograd runs what was recorded last first. So when the gradient of some call's output
arrives, all that was recorded after that call ended has been done, and every call that began later is over. (The
gradients of a call's own inputs would tell too late: an encoder's output goes into every block of a decoder, and its
gradient is there when all of them are over.) What is left is over at the end of autograd's graph task; each recomputed
part of a reentrant checkpoint has a task of its own. All of this is the same on every rank that runs the same modules,
whichever of their parameters get a gradient there.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zerolith.errors import UsageError
from zerolith.outputs import has_history, on_gradient, tensors_in
from zerolith.pace import Pace
from zerolith.parameter import ShardedParameter, refuse
from zerolith.schedule import Order
from zerolith.unit import Phase, Unit, Until

logger = logging.getLogger("zerolith")


def graph_task() -> int:
    """Number of the backward that autograd runs on this thread; -1 if none."""
    return torch._C._current_graph_task_id()  # there is no public way to ask


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread."""
    return graph_task() != -1


class Call:
    """One forward of one module, as its backward will need to know it."""

    def __init__(self, *, now: int) -> None:
        self.units: list[Unit] = []  # that it uses
        self.began = now  # readings of the gatherer's clock
        self.ended = now
        self.task = -1  # the graph task in which its backward began last


class Gatherer:
    """Owner of the hooks of one model; `units[0]` is the root's.

    `when_done` is told of a unit when no call of it in this backward is left.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        modules: Sequence[nn.Module],
        *,
        prefetch: bool,
        when_done: Callable[[Unit], None],
    ) -> None:
        self.units = list(units)
        self.prefetch = prefetch
        self._when_done = when_done
        self._numbers = {unit: number for number, unit in enumerate(units)}
        self._forward_order, self._backward_order = Order(), Order()
        self._paces = {order: Pace() for order in (self._forward_order, self._backward_order)}
        self._clock = itertools.count(1)
        self._running = threading.local()  # see `_calls`
        self._open: list[Call] = []  # calls whose backward has begun
        self._tasks: list[int] = []  # graph tasks that are running, outermost first
        self._awaited: Counter[Unit] = Counter()  # by unit: forwards whose backward has not begun
        self._keeping = False  # after a backward with create_graph, until the backward of that one is over
        self._is_differentiated = False  # the backward under way is such a one
        self._aside: dict[tuple[int, str], weakref.ref[Tensor]] = {}  # by module and attribute: tensors left there
        self._unrecorded: dict[int, int] = {}  # by module: when its last forward ended, if that was without a graph
        self._external: dict[int, list[Unit]] = {}  # by module: units of other modules that its forward needs
        self._handles: list[Any] = []  # torch's RemovableHandle
        self._own: dict[int, list[Unit]] = {}  # by module that has our hooks: its unit; the model keeps them alive
        for unit, module in zip(units, modules, strict=True):
            self._install(module, [unit])
        others = {*modules}
        self._within = {  # by module: itself and those in it that have no unit of their own, without torch's
            id(module): [
                each
                for _, each in module.named_modules(memo=others - {module})
                if not type(each).__module__.startswith("torch.nn.modules.")
            ]
            for module in modules
        }

    @property
    def _calls(self) -> list[tuple[nn.Module, Call]]:
        """Forwards that are running in this thread, outermost first."""
        calls: list[tuple[nn.Module, Call]] = self._running.__dict__.setdefault("calls", [])
        return calls

    def add_external(self, module: nn.Module, unit: Unit) -> None:
        """From now on `unit` is whole while `module` computes, too."""
        needed = self._external.setdefault(id(module), [])
        if unit not in needed:
            needed.append(unit)
        if id(module) not in self._own:
            self._install(module, [])

    def remove_external(self, module: nn.Module, unit: Unit) -> None:
        """Take `add_external` back."""
        if unit in self._external.get(id(module), []):
            self._external[id(module)].remove(unit)

    def touch(self, unit: Unit, stand_in: ShardedParameter, param: Tensor) -> Tensor:
        """The whole parameter behind `stand_in`, for a forward that uses one of another module's unit."""
        if not self._calls:
            return refuse(stand_in)
        self._gather(unit)
        self._lend(unit)
        return param

    def begin_backward(self) -> None:
        """A backward begins, or has begun with a tensor whose hook came before this call."""
        if graph_task() not in self._tasks:
            self._open.clear()
            self._tasks.clear()
            self._restart(self._backward_order)

    def end_backward(self) -> None:
        """Release what need not stay whole until the step: nothing computes before the next forward."""
        self._open.clear()
        self._tasks.clear()
        self._keeping = self._keeping and self._is_differentiated
        self._release_unused()

    def release_all(self) -> None:
        """Bring every unit to rest that no running forward uses."""
        self._keeping = False
        self._release(self.units)

    def end_micro_batch(self) -> None:
        """As `end_backward`; and backwards of the forwards so far are not waited for."""
        self._awaited.clear()
        self.end_backward()

    def check_idle(self) -> None:
        """Raises UsageError if a unit is in use and would not get new weights."""
        if self._calls:
            raise UsageError(
                f"step() while a forward of a {type(self._calls[0][0]).__name__} runs; if an interrupt ended it, call "
                "engine.reset()"
            )
        used = next((unit.name for unit in self.units if unit.uses > 0), None)
        if used is not None:
            raise UsageError(f"step() inside zero.GatheredParameters (of {used}): leave it before the step")

    def reset(self) -> None:
        """After an exception: no forward is running any more."""
        for _, call in self._calls:
            for unit in call.units:
                unit.leave()
        self._calls.clear()
        self._keeping = self._is_differentiated = False
        self.end_micro_batch()
        self.release_all()

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self, module: nn.Module, own: list[Unit]) -> None:
        # Weak, and bound to this module: a deep copy of the model has the same hooks, which then do nothing.
        this, original = weakref.ref(self), weakref.ref(module)
        self._own[id(module)] = own

        def follow(method: Callable[..., None], called: nn.Module, args: Any, *output: Any) -> None:
            gatherer = this()
            if gatherer is not None and called is original():
                method(gatherer, called, *output)

        self._handles += [
            module.register_forward_pre_hook(partial(follow, Gatherer._pre_forward), prepend=True),
            module.register_forward_hook(partial(follow, Gatherer._post_forward), always_call=True),
        ]

    def _pre_forward(self, module: nn.Module) -> None:
        if not self._calls and not in_backward():
            self._restart(self._forward_order)
            if torch.is_grad_enabled():  # another thread may only look on, while this one is in a backward
                self._open.clear()  # of a backward that failed
                self._tasks.clear()
        units = dict.fromkeys([*self._own[id(module)], *self._external.get(id(module), ())])
        call = Call(now=next(self._clock))
        self._calls.append((module, call))
        if in_backward() and id(module) in self._unrecorded:
            # A reentrant checkpoint recomputes. The graph around it has passed all that came after it.
            self._finish_later_than(self._unrecorded[id(module)], graph_task())
        for unit in units:
            unit.enter()
            call.units.append(unit)
            self._gather(unit)

    def _post_forward(self, module: nn.Module, output: Any) -> None:
        if not self._calls or self._calls[-1][0] is not module:
            return  # another hook failed before ours ran
        _, call = self._calls.pop()
        call.ended = next(self._clock)
        if not torch.is_grad_enabled():
            self._unrecorded[id(module)] = call.ended
        elif not in_backward():
            self._unrecorded.pop(id(module), None)
        tensors = list(tensors_in(output))
        for unit in call.units:
            unit.leave()
            if self._calls and any(unit.lends(tensor) for tensor in tensors):
                self._lend(unit)
            if unit.uses == 0 and not in_backward() and not self._keeping and not self._stays(unit):
                unit.release()
        if torch.is_grad_enabled():
            self._await_backward(call, [*tensors, *self._left_aside(module)])
        elif not self._calls and not in_backward() and not self._keeping:
            self._release(self.units)  # what was gathered ahead and not used, too

    def _stays(self, unit: Unit) -> bool:
        """Whether a forward that has used `unit` leaves it whole for who comes next."""
        if not torch.is_grad_enabled():
            return False
        # The unit that forward used last is the one that backward will use first.
        return unit.until is not Until.USED or self._forward_order.ends_with(self._numbers[unit])

    def _lend(self, unit: Unit) -> None:
        """The forward that is running needs `unit` until its own end, and will the next time."""
        module, call = self._calls[-1]
        if unit not in call.units:
            call.units.append(unit)
            unit.enter()
            self.add_external(module, unit)
            kind = type(module).__name__
            logger.info("parameters of %s are used by a %s, which keeps them whole from now on", unit.name, kind)

    def _left_aside(self, module: nn.Module) -> Iterator[Tensor]:
        """What a forward has left in attributes of its modules, where others find it: losses of a router."""
        for inner in self._within.get(id(module), ()):
            for name, value in vars(inner).items():
                if isinstance(value, Tensor) and has_history(value):
                    seen = self._aside.get((id(inner), name))
                    if seen is None or seen() is not value:
                        self._aside[id(inner), name] = weakref.ref(value)
                        yield value

    def _await_backward(self, call: Call, outputs: list[Tensor]) -> None:
        if on_gradient(outputs, partial(self._pre_backward, call)) and not in_backward():
            self._awaited.update(call.units)

    def _pre_backward(self, call: Call, grad: Tensor) -> None:
        task = graph_task()
        if call.task == task:
            return
        call.task = task
        self._enter_task(task)
        self._open.append(call)  # first: a unit that both need is not released in between
        self._finish_later_than(call.ended, task)
        for unit in call.units:
            self._awaited[unit] -= 1
            self._gather(unit)

    def _enter_task(self, task: int) -> None:
        if task in self._tasks:
            return
        if not self._tasks:
            self._restart(self._backward_order)
            self._is_differentiated = torch.is_grad_enabled()
            self._keeping = self._keeping or self._is_differentiated
        self._tasks.append(task)
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._leave_task, task))

    def _leave_task(self, task: int) -> None:
        self._finish_later_than(0, task)  # all that is left of it: clocks begin at 1
        if task in self._tasks:
            self._tasks.remove(task)
            if not self._tasks:
                self.end_backward()

    def _finish_later_than(self, moment: int, task: int) -> None:
        for call in [call for call in self._open if call.began > moment and call.task == task]:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        """`call` needs nothing any more in this backward."""
        self._open.remove(call)
        for unit in call.units:
            if any(unit in other.units for other in self._open):
                continue
            if unit.uses == 0 and unit.until is Until.USED and not self._keeping:
                unit.release()
            if self._awaited[unit] <= 0:
                self._when_done(unit)

    def _restart(self, order: Order) -> None:
        order.restart()
        self._paces[order].restart()

    @torch.no_grad()
    def _gather(self, unit: Unit) -> None:
        if not unit.is_sharded:
            return
        order = self._backward_order if in_backward() else self._forward_order
        pace = self._paces[order]
        following = order.visit(self._numbers[unit])
        was_whole = unit.phase is Phase.GATHERED
        with pace.waiting():
            unit.gather()
            if self.prefetch and following is not None:
                self._look_ahead([following, *order.expected(pace.ahead)])
        if not was_whole:
            pace.use(read_s=unit.read_seconds)

    def _look_ahead(self, numbers: Sequence[int]) -> None:
        """Gather the first of these units while the one at hand computes, and begin to read all of them."""
        # What is being updated is not waited for before this unit computes. The flag is the same on every rank.
        ahead = [self.units[number] for number in dict.fromkeys(numbers)]
        ahead = list(itertools.takewhile(lambda each: not each.is_behind, ahead))
        for each in ahead[:1]:
            each.start_gather()
        for each in ahead:
            each.read_ahead()

    def _release_unused(self) -> None:
        if not self._keeping:
            # One that is on its way was expected, and not used: what changes its shards would pass it by.
            self._release(each for each in self.units if each.until is not Until.STEP or each.phase is Phase.GATHERING)

    def _release(self, units: Iterable[Unit]) -> None:
        for unit in units:
            if unit.uses == 0:
                unit.release()
