"""Which engine's buffers hold a parameter: asked by functions that are given nothing but the parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from zerolith.errors import UsageError
from zerolith.gradients import Gradients
from zerolith.optim import PartitionedOptimizer
from zerolith.section import Section
from zerolith.sharded_model import Place, ShardedModel


@dataclass(frozen=True, slots=True)
class Owner:
    """What holds one parameter."""

    sharded: ShardedModel
    optimizer: PartitionedOptimizer | None
    place: Place
    terms: Callable[[], float]  # by which the gradient sum is divided to give the mean

    @property
    def gradients(self) -> Gradients | None:
        return self.sharded.gradients_of(self.place.section)


_Known = tuple[PartitionedOptimizer | None, Callable[[], float]]

# Entries go with the parameter or with the engine, whichever is first.
_SHARDED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter or stand-in -> weakref to its ShardedModel
_KNOWN: weakref.WeakKeyDictionary[ShardedModel, _Known] = weakref.WeakKeyDictionary()


def register(sharded: ShardedModel, optimizer: PartitionedOptimizer | None, terms: Callable[[], float]) -> None:
    """Make `owner_of` know every parameter of `sharded`. Raises UsageError if another engine has one of them."""
    tensors = [tensor for section in sharded.sections for tensor in _tensors(section)]
    for tensor in tensors:
        known = _SHARDED.get(tensor)
        if known is not None and known() is not None:
            raise UsageError(
                "a parameter of this model belongs to another engine already; call destroy() on that engine first"
            )
    for tensor in tensors:
        _SHARDED[tensor] = weakref.ref(sharded)
    _KNOWN[sharded] = (optimizer, terms)


def forget(sharded: ShardedModel) -> None:
    """Undo `register`."""
    for section in sharded.sections:
        for tensor in _tensors(section):
            _SHARDED.pop(tensor, None)
    _KNOWN.pop(sharded, None)


def owner_of(param: Tensor) -> Owner | None:
    """Who holds `param`, a real parameter or its stand-in; None if no engine does."""
    reference = _SHARDED.get(param)
    sharded = reference() if reference is not None else None
    if sharded is None:
        return None
    place, known = sharded.place_of(param), _KNOWN.get(sharded)
    return Owner(sharded, known[0], place, known[1]) if place is not None and known is not None else None


def _tensors(section: Section) -> list[Tensor]:
    members = [member.param for member in section.members]
    return [*members, *section.stand_ins]
