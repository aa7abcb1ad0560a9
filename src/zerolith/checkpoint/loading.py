"""Filling a run's tensors from a checkpoint: masters are brought to the weights while the rest is still being read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from zerolith.checkpoint.content import Part
from zerolith.checkpoint.reader import Reader
from zerolith.checkpoint.training_state import (
    Sharded,
    buffer_parts,
    gradient_parts,
    master_parts,
    state_keys,
    state_parts,
    weight_parts,
)
from zerolith.comm import Pending
from zerolith.errors import DistributedError
from zerolith.section import Section


class StoppedElsewhere(Exception):
    """Another rank cannot go on, so this one has stopped; the other tells why when they agree."""


class Arrivals:
    """Publishes sections that have their values, in one order on all ranks, each while the next is being read.

    A rank whose reading fails must `give_up`: the others wait for it.
    """

    def __init__(self, sharded: Sharded) -> None:
        self._comm = sharded.model.comm
        whole = sharded.optimizer.whole if sharded.optimizer is not None else {}
        self._whole = {own.section: tensors for own, tensors in whole.items()}
        self._left = deque(sharded.model.sections)
        self._here: set[Section] = set()
        self._pending: list[Pending] = []  # what is on its way between ranks
        self._is_stopped = False  # by another rank
        sharded.model.release_all()

    def arrived(self, section: Section) -> None:
        """This rank has all values of `section`. Raises StoppedElsewhere if another rank has given up."""
        self._here.add(section)
        while self._left and self._left[0] in self._here:
            self._publish(self._left.popleft())

    def settle(self) -> None:
        """Wait for what is on its way."""
        while self._pending:
            self._pending.pop(0).wait()

    def give_up(self) -> None:
        """Let all ranks stop at the section where this one does."""
        if not self._is_stopped and any(map(_is_collective, self._left)):
            self._comm.max([1.0], name="values loaded")
        self.settle()

    def _publish(self, section: Section) -> None:
        if not _is_collective(section):
            self._start(section)
            self.settle()
            return
        self._is_stopped = self._comm.max([0.0], name="values loaded")[0] > 0
        if self._is_stopped:
            raise StoppedElsewhere
        try:
            self._start(section)
        except Exception as error:  # the others are in the midst of it: there is no agreeing any more
            raise DistributedError(f"the weights of {section.name} could not be exchanged: {error}") from error

    def _start(self, section: Section) -> None:
        if section in self._whole:
            with section.near(to_write=True):
                self._whole[section].put_values(section.weights.own())
        self._pending.append(section.start_publish())


def fill_tensors(sharded: Sharded, reader: Reader, names: set[str], arrivals: Arrivals, *, takes_states: bool) -> None:
    """Read every tensor of the run that the checkpoint has; sections go to `arrivals`.

    A section at a time if some rest elsewhere: they are not in memory all at once.
    """
    keys, model, optimizer = state_keys(reader.manifest), sharded.model, sharded.optimizer
    owns = {own.section: own for own in optimizer.gradients} if optimizer is not None else {}

    def parts_of(section: Section, here: ExitStack) -> list[Part]:
        if optimizer is None or section not in owns:
            here.enter_context(section.near(to_write=True))
            return weight_parts(section, names)
        own = owns[section]
        here.enter_context(optimizer.residency.resident(own))
        states = state_parts(optimizer, own, reader.manifest, keys) if takes_states else []
        return master_parts(optimizer, own, names) + states

    _fill_then_call(reader, *buffer_parts(sharded, reader.manifest))
    is_swapped = model.residency.is_swapped or (optimizer is not None and optimizer.residency.is_swapped)
    for together in [[section] for section in model.sections] if is_swapped else [model.sections]:
        with ExitStack() as here:
            reader.fill_groups({section: parts_of(section, here) for section in together}, arrivals.arrived)
    if takes_states:
        _fill_then_call(reader, *gradient_parts(sharded, reader.manifest))


def _fill_then_call(reader: Reader, parts: list[Part], after: Sequence[Callable[[], None]]) -> None:
    reader.fill(parts)
    for call in after:
        call()


def _is_collective(section: Section) -> bool:
    """Whether ranks publish it together."""
    return section.plan.comm.size > 1 and (not section.is_sharded or section.has_masters_elsewhere)
