"""Which engine's buffers hold a parameter: asked by functions that are given nothing but the parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from zerolith.gradients import Gradients
from zerolith.optim import PartitionedOptimizer
from zerolith.sharded_model import Place, ShardedModel


@dataclass(frozen=True, slots=True)
class Owner:
    """What holds one parameter."""

    sharded: ShardedModel
    optimizer: PartitionedOptimizer | None
    place: Place
    terms: Callable[[], float]  # by which the gradient sum is divided to give the mean

    def refuse_ahead(self) -> None:
        """Raise UsageError where nothing but step() may follow."""
        if self.optimizer is not None:
            self.optimizer.ahead.refuse()

    @property
    def gradients(self) -> Gradients | None:
        self.refuse_ahead()
        self.place.section.settle()
        return self.sharded.gradients_of(self.place.section)

    def resident(self) -> AbstractContextManager[None]:
        """In which the parameter's master and optimizer states may be touched."""
        self.refuse_ahead()
        return self.place.section.resident()


_Known = tuple[PartitionedOptimizer | None, Callable[[], float]]

# One entry for each live engine; it goes with the engine.
_KNOWN: weakref.WeakKeyDictionary[ShardedModel, _Known] = weakref.WeakKeyDictionary()


def register(sharded: ShardedModel, optimizer: PartitionedOptimizer | None, terms: Callable[[], float]) -> None:
    """Make `owner_of` know every parameter of `sharded`, which no other engine has."""
    _KNOWN[sharded] = (optimizer, terms)


def forget(sharded: ShardedModel) -> None:
    """Undo `register`."""
    _KNOWN.pop(sharded, None)


def owner_of(param: Tensor) -> Owner | None:
    """Who holds `param`, a real parameter or its stand-in; None if no engine does."""
    for sharded, (optimizer, terms) in _KNOWN.items():
        place = sharded.place_of(param)
        if place is not None:
            return Owner(sharded, optimizer, place, terms)
    return None
