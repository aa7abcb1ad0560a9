"""A set of parameters that are gathered, reduced, stepped and published together."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from zerolith.comm import Pending
from zerolith.errors import PhaseError, UsageError
from zerolith.section import Section


class Phase(Enum):
    """Where a unit's whole parameters are. Units whose parameters rest whole are always GATHERED."""

    REST = "at rest, sharded"
    GATHERING = "being gathered"
    GATHERED = "whole"


class Until(Enum):
    """How long a sharded unit stays whole once it has been gathered."""

    USED = "until the forward or the backward that uses it is over"
    BACKWARD = "until the backward after that forward is over"
    STEP = "until its weights change"


LEGAL = {(Phase.REST, Phase.GATHERING), (Phase.GATHERING, Phase.GATHERED), (Phase.GATHERED, Phase.REST)}


class Unit:
    """Sections that move together, and the phase they are in.

    `uses` counts what needs a sharded unit whole: forwards that run, GatheredParameters that are open.
    """

    def __init__(self, name: str, sections: Sequence[Section], *, until: Until) -> None:
        self.name = name
        self.sections = list(sections)
        self.until = until
        self.uses = 0
        self.is_sharded = any(section.is_sharded for section in sections)
        self.phase = Phase.REST if self.is_sharded else Phase.GATHERED
        self._pending: list[Pending] = []

    def enter(self) -> None:
        """It is needed whole until `leave`."""
        if self.is_sharded:  # others may be used by several threads at once
            self.uses += 1

    def leave(self) -> None:
        """Take `enter` back."""
        if self.is_sharded:
            self.uses -= 1

    @property
    def is_behind(self) -> bool:
        """Whether to gather it would wait for an update that was begun since it was last gathered."""
        return any(section.is_behind for section in self.sections)

    @property
    def numel(self) -> int:
        """Elements of the unit's buffers, padding included."""
        return sum(section.layout.numel for section in self.sections)

    def lends(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a sharded parameter of this unit or a view of one."""
        return self.is_sharded and any(section.whole.holds(tensor) for section in self.sections)

    def start_gather(self) -> None:
        """Begin to gather, unless that is done or under way. Collective."""
        if self.phase is Phase.REST:
            self._pending = [section.start_gather() for section in self.sections]
            self._move(Phase.GATHERING)

    def read_ahead(self) -> None:
        """Begin to bring shards near that rest elsewhere, for a gather to come. Does not communicate."""
        if self.phase is Phase.REST:
            for section in self.sections:
                section.read_ahead()

    @property
    def read_seconds(self) -> float | None:
        """How long its shards' last read took; None if nobody knows. Its sections are read at the same time."""
        times = [section.plan.residency.read_seconds(section) for section in self.sections]
        return max((each for each in times if each is not None), default=None)

    def gather(self) -> None:
        """Make the parameters whole and put them into their modules. Collective unless they are whole already.

        Raises UsageError if the step under way has updated them.
        """
        for section in self.sections:
            refuse_ahead(section)
        self.start_gather()
        self._finish_gather()

    def _finish_gather(self) -> None:
        if self.phase is Phase.GATHERING:
            for pending, section in zip(self._pending, self.sections, strict=True):
                pending.wait()
                section.install_whole()
            self._pending = []
            self._move(Phase.GATHERED)

    def release(self) -> None:
        """Let go of the whole parameters. Does not communicate; waits for a gather under way."""
        if not self.is_sharded or self.phase is Phase.REST:
            return
        self._finish_gather()
        for section in self.sections:
            section.release()
        self._move(Phase.REST)

    def _move(self, phase: Phase) -> None:
        if (self.phase, phase) not in LEGAL:
            raise PhaseError(f"unit {self.name!r} is {self.phase.value} and cannot become {phase.value}")
        self.phase = phase
        for section in self.sections:
            section.at_rest = phase is Phase.REST


def refuse_ahead(section: Section) -> None:
    """Raises UsageError if a step that has not been taken yet has updated the section in its backward."""
    if section.is_ahead:
        raise UsageError(
            f"{section.name} is updated already by the step under way, whose updates begin in backward "
            '(zero_optimization.offload_optimizer.overlap is "backward"): call step() before anything else, and let no '
            "module have a part in two backwards of a step"
        )
