"""Gathering around modules' forwards and backwards, by hooks on the modules themselves.

A unit is gathered before its module runs, released after it, gathered again before its backward and released when
the gradients of the module's inputs are there. The next unit's gather starts while this one computes.

[Note: release by phase] A forward that runs inside a backward (activation checkpointing recomputes) does not
release: only backward may, because the recomputed tensors are about to be used. So both nestings of
checkpointing and units work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zerolith.parameter import ShardedParameter, refuse
from zerolith.schedule import Order
from zerolith.unit import Phase, Unit


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[no-any-return]  # no public way to ask


class Call:
    """One forward of one module, as its backward will need to know it."""

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        self.backward = 0  # number of the backward in which this call's own began
        self.inputs_left = 0


class Gatherer:
    """Owner of the gather hooks of one model; `units[0]` is the root's."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], modules: Sequence[nn.Module], *, prefetch: bool) -> None:
        self.units = list(units)
        self.prefetch = prefetch
        self._model = model
        self._numbers = {id(unit): number for number, unit in enumerate(units)}
        self._forward_order, self._backward_order = Order(), Order()
        self._calls: list[tuple[nn.Module, Call]] = []  # forwards that are running, outermost first
        self._backward = 0  # counts backwards
        self._backward_uses = [0] * len(units)
        self._external: dict[int, list[Unit]] = {}  # by module: units of other modules that its forward needs
        self._handles: list[Any] = []  # torch's RemovableHandle
        self._hooked: set[int] = set()  # modules, by id; the model keeps them alive
        for unit, module in zip(units, modules, strict=True):
            if unit.is_sharded or module is model:
                self._install(module, unit)

    def add_external(self, module: nn.Module, unit: Unit) -> None:
        """From now on `unit` is whole while `module` computes, too."""
        needed = self._external.setdefault(id(module), [])
        if unit not in needed:
            needed.append(unit)
            if id(module) not in self._hooked:
                self._install(module, None)

    def remove_external(self, module: nn.Module, unit: Unit) -> None:
        """Take `add_external` back."""
        if unit in self._external.get(id(module), []):
            self._external[id(module)].remove(unit)

    def touch(self, unit: Unit, stand_in: ShardedParameter, param: Tensor) -> Tensor:
        """The whole parameter behind `stand_in`, for a forward that uses one of another module's unit."""
        if not self._calls:
            return refuse(stand_in)
        module, call = self._calls[-1]
        self._gather(unit, self._forward_order)
        if unit not in call.units:
            call.units.append(unit)
            unit.uses += 1
            self._external.setdefault(id(module), []).append(unit)
        return param

    def begin_backward(self) -> None:
        self._backward += 1
        self._backward_order.restart()

    def end_backward(self) -> None:
        """Release every unit: nothing needs whole parameters between backward and the next forward."""
        self._backward_uses = [0] * len(self.units)
        self.release_all()

    def release_all(self) -> None:
        for unit in self.units:
            if unit.uses == 0:
                unit.release()

    def reset(self) -> None:
        """After an exception: no forward is running any more."""
        self._calls.clear()
        for unit in self.units:
            unit.uses = 0
        self.end_backward()

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self, module: nn.Module, unit: Unit | None) -> None:
        self._hooked.add(id(module))
        own = [unit] if unit is not None and unit.is_sharded else []
        self._handles += [
            module.register_forward_pre_hook(partial(self._pre_forward, own), with_kwargs=True, prepend=True),
            module.register_forward_hook(self._post_forward, always_call=True),
        ]

    def _pre_forward(self, own: list[Unit], module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model and not self._calls and not in_backward():
            self._forward_order.restart()
        call = Call([*own, *self._external.get(id(module), ())])
        self._calls.append((module, call))
        for unit in call.units:
            unit.uses += 1
            self._gather(unit, self._forward_order)
        if torch.is_grad_enabled():
            self._watch_inputs(call, (args, kwargs))

    def _post_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        _, call = self._calls.pop()
        recomputing = in_backward()
        for unit in call.units:
            unit.uses -= 1
            kept = unit.stays and torch.is_grad_enabled()
            if unit.uses == 0 and not recomputing and not kept:
                unit.release()
        if call.units and torch.is_grad_enabled():
            for tensor in _tensors(output):
                tensor.register_hook(partial(self._pre_backward, call))

    def _pre_backward(self, call: Call, grad: Tensor) -> None:
        if call.backward == self._backward:
            return
        call.backward = self._backward
        for unit in call.units:
            self._backward_uses[self._numbers[id(unit)]] += 1
            self._gather(unit, self._backward_order)

    def _watch_inputs(self, call: Call, inputs: Any) -> None:
        watched = _tensors(inputs)
        call.inputs_left = len(watched)
        for tensor in watched:
            tensor.register_hook(partial(self._post_backward, call, len(watched)))

    def _post_backward(self, call: Call, watched: int, grad: Tensor) -> None:
        call.inputs_left -= 1
        if call.inputs_left:
            return
        call.inputs_left = watched  # for another backward through the same graph
        if call.backward != self._backward:
            return  # this call's outputs have no part in this backward
        for unit in call.units:
            number = self._numbers[id(unit)]
            self._backward_uses[number] -= 1
            if self._backward_uses[number] == 0 and unit.uses == 0 and not unit.stays:
                unit.release()

    @torch.no_grad()
    def _gather(self, unit: Unit, order: Order) -> None:
        if unit.phase is Phase.GATHERED:
            return
        following = order.visit(self._numbers[id(unit)])
        unit.gather()
        if self.prefetch and following is not None:
            self.units[following].start_gather()


def _tensors(tree: Any) -> list[Tensor]:
    """The distinct tensors in nested containers whose gradient will be computed."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return list({id(leaf): leaf for leaf in leaves}.values())
