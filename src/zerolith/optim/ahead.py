"""Updates that begin in backward: a section's, as soon as its gradient is complete, whose memory then goes.

[Note: ahead] They are made before anything is known of the gradients that are still to come. With before images
(before_images.py) they are a guess, made where the last step clipped nothing. If gradients are clipped, or one of them
is not finite, the step takes them back on each rank, and updates as if none had begun. Without, gradients cannot be
clipped by their norm, and one that is not finite cannot undo what was updated before it came: the step is an error
then, on every rank. From the last micro-batch's backward to the step, the engine does nothing else: weights, masters
and states may be of either step. The step finds every number that it needs of a gradient in `squares`. Each rank
decides alone which of its sections are ready (a module may have been left out there): what needs all ranks, publishing
whole weights, is left to the step, which does the rest of the updates, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from zerolith.comm import Comm, agree
from zerolith.errors import UsageError
from zerolith.gradients import Gradients
from zerolith.optim.before_images import BeforeImage, BeforeImages

Options = list[dict[str, Any]]  # of each param group


class _Phase(Enum):
    """Where a step is whose updates begin in backward. The same on all ranks, but for STOPPED."""

    IDLE = "no such step is under way"
    BEGINNING = "its last backward has begun, and step() has not"
    STOPPED = "the same, and a gradient was not finite: no more updates begin"
    STEPPING = "step() is under way: it may look at everything"


class Ahead:
    """Which sections this step has updated in its backward. Without `eligible` sections it does nothing."""

    def __init__(
        self,
        eligible: Sequence[Gradients],
        comm: Comm,
        *,
        # An update, given options, factor of the gradient and what is to be filled before.
        begin: Callable[[Gradients, Options, float, BeforeImage | None], None],
        undo: Callable[[Gradients, BeforeImage], None],
        options: Callable[[], Options],  # as they are now
        terms: Callable[[], float],  # by which a gradient sum is divided
        may_begin: Callable[[], bool],
        checks: bool,  # whether a step is skipped if a gradient is not finite
        images: BeforeImages | None,  # given, updates can be taken back
    ) -> None:
        self.eligible = dict.fromkeys(eligible)
        self.begun: dict[Gradients, BeforeImage | None] = {}  # by this rank
        self._comm = comm
        self._begin, self._undo, self._images = begin, undo, images
        self._options_now, self._terms, self._may_begin = options, terms, may_begin
        self._factor = 1.0  # of gradients in updates that begin
        self._guesses_well = images is None  # whether the last step's factor of the gradients was what updates expect
        self._checks = checks
        self._waiting: list[Gradients] = []  # whose weights are whole still: the root's, until backward ends
        self._options: Options = []  # when the backward began
        self._phase = _Phase.IDLE

    @property
    def is_under_way(self) -> bool:
        """From a backward that completes a step's gradients, and begins its updates, to the step's end."""
        return self._phase is not _Phase.IDLE

    @property
    def is_final(self) -> bool:
        """Whether an update that was begun stays."""
        return self._images is None

    def frees(self, own: Gradients) -> bool:
        """Whether the memory of a section's gradient goes in backward."""
        return own in self.eligible and self.is_final

    def backward_begins(self, *, is_last: bool) -> None:
        """Get ready if it completes the gradients of a step. Raises UsageError if a step is due."""
        if self.is_under_way:
            _refuse()
        if is_last and self.eligible and self._may_begin():
            self._phase = _Phase.BEGINNING
            self._options, self._factor = self._options_now(), 1.0 / self._terms()

    def summed(self, own: Gradients) -> None:
        """A section's gradient is reduced: begin its update, and those that had to wait, if nothing can be missing."""
        if self._phase is not _Phase.BEGINNING or own not in self.eligible or not self._guesses_well:
            return
        self._waiting.append(own)
        for each in list(self._waiting):
            if each.section.at_rest or not each.section.is_sharded:
                self._waiting.remove(each)
                self._begin_if_complete(each)

    def _begin_if_complete(self, own: Gradients) -> None:
        if (
            self._phase is _Phase.STOPPED
            or own.term is not None
            or not all(own.used)
            or not _has_elements(own, self._comm.rank)
        ):
            return
        if self._checks and not torch.isfinite(own.squares).all():
            self._phase = _Phase.STOPPED  # in backward all that comes after it is not finite either, most of the time
            return
        if own.section.edited():
            own.section.adopt_edits()
        image = self._images.make(own) if self._images is not None else None
        if image is None and self._images is not None:
            return
        own.section.is_ahead = True
        self.begun[own] = image
        self._begin(own, self._options, self._factor, image)

    def refuse(self) -> None:
        """Raise UsageError between such a backward and its step."""
        if self._phase in (_Phase.BEGINNING, _Phase.STOPPED):
            _refuse()

    def step_begins(self) -> None:
        """Let the step look at everything. Collective after such a backward.

        Raises UsageError, on all ranks, if what the step should do is not what was begun on one of them.
        """
        if not self.is_under_way:
            return
        self._phase = _Phase.STEPPING
        error, edited = None, [own for own in self.begun if not own.section.is_sharded and own.section.edited()]
        if not _equal(self._options, self._options_now()):
            error = UsageError(
                "options of the optimizer, such as its learning rate, were changed between the backward that has begun "
                "this step's updates and step(): change them before that backward"
            )
        elif edited:
            error = UsageError(
                f"weights of {edited[0].section.name} were edited between the backward that has begun this step's "
                "updates and step(): edit them before that backward, or after step()"
            )
        if self._images is None:
            agree(self._comm, error, doing="a step that backward has begun", kind=UsageError)
        elif error is not None:
            self.take_back()

    def take_back(self) -> None:
        """Let all that this rank has updated be as it was before. Needs before images; does not communicate."""
        for image in self.begun.values():
            assert image is not None, "else nothing can be taken back"
            image.cancel()
        for own, image in list(self.begun.items()):  # one by one: what an interrupt leaves is taken back the next time
            assert image is not None, "as above"
            self._undo(own, image)
            own.section.is_ahead = False
            del self.begun[own]

    def use_factor(self, factor: float) -> None:
        """The step multiplies gradients by this: what was updated with another factor is taken back."""
        if self._images is not None:
            self._guesses_well = factor == 1.0 / self._terms()
            if factor != self._factor:
                self.take_back()

    def check_late(self, late: Sequence[bool], gradients: Sequence[Gradients]) -> None:
        """Gradients came after an update may have used the others: take it back, or raise UsageError on all ranks."""
        for own, is_late in zip(gradients, late, strict=True):
            if is_late and self._images is not None:
                self.take_back()
            elif is_late and self.is_under_way and own in self.eligible:
                raise UsageError(
                    f"a gradient of {own.section.name} came when it had been updated: a parameter is used outside of "
                    "its module, or in two parts of a reentrant checkpoint. Set zero_optimization.offload_optimizer."
                    'overlap to "forward"'
                )

    def check_skip(self, culprit: str) -> None:
        """A step is about to be skipped: take back what was updated, or raise UsageError on all ranks if one has.

        It is over otherwise. Collective, unless updates can be taken back.
        """
        if self._images is not None:
            self.take_back()
        elif self.has_begun_anywhere():
            raise UsageError(
                f"the gradient of {culprit} is not finite, and others have been used already, in backward; go on from "
                'a checkpoint, with zero_optimization.offload_optimizer.overlap "forward" to have such steps skipped'
            )
        self.end()

    def has_begun_anywhere(self) -> bool:
        """Whether any rank has begun updates of the step under way. Collective, if there can be any."""
        flag = float(bool(self.begun))
        return bool(self.eligible) and self._comm.max([flag], name="updates in backward")[0] > 0

    def end(self) -> bool:
        """The step is over, or given up; returns whether this rank had begun any update of it, which stays."""
        begun, self.begun = self.begun, {}
        self._phase = _Phase.IDLE
        self._waiting.clear()
        for own, image in begun.items():
            own.section.is_ahead = False
            if image is not None:
                image.drop()
        return bool(begun)


def _refuse() -> NoReturn:
    raise UsageError(
        "the last backward has begun this step's updates (zero_optimization.offload_optimizer.overlap is "
        '"backward"), so nothing but step() may follow: call it first'
    )


def _has_elements(own: Gradients, rank: int) -> bool:
    """Whether a rank has anything of a section but padding, whose zeros tell nothing of a gradient."""
    layout = own.section.layout
    return any(layout.owned(index, rank).numel for index in range(len(layout.slots)))


def _equal(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
        for one, other in zip(some, others, strict=True)
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
