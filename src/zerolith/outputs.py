"""The tensors in what modules return, and the moment at which backward comes to them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

NO_TENSORS_IN = (str, bytes, int, float, type, FunctionType, MethodType, nn.Module)


def tensors_in(output: Any) -> Iterator[Tensor]:  # whatever a module returns
    """The tensors in an output: in containers, dataclasses and other objects, at any depth."""
    pending, seen = [output], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, NO_TENSORS_IN):
            seen.add(id(value))
            pending += _parts(value)


def on_gradient(tensors: Iterable[Tensor], hook: Callable[[Tensor], None]) -> bool:
    """Have `hook` called when the gradient of one of them comes; returns whether that can be.

    Not that of leaves: hooks on them outlive this forward, and no module's backward lies behind them. Of a view its
    base is watched, too: whoever writes to the view in place gives it another history, without the hook.
    """
    watched = {}
    for tensor in tensors:
        for each in (tensor, tensor._base):
            if each is not None and has_history(each):
                watched[id(each)] = each
    for each in watched.values():
        each.register_hook(hook)
    return bool(watched)


def has_history(tensor: Tensor) -> bool:
    """Whether backward comes through `tensor`; not through a leaf, nor what autograd refuses to say it of."""
    try:
        return tensor.grad_fn is not None
    except RuntimeError:  # a view that was made without a graph, of what was written to with one
        return False


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, each.name, None) for each in dataclasses.fields(value)]
    slots = [name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]


def _names(slots: Any) -> Iterable[str]:  # a class's __slots__: a name, or some
    return [slots] if isinstance(slots, str) else list(slots)
