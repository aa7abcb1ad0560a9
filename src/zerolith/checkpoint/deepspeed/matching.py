"""Which parameters an optimizer's groups hold, where the files do not say: the one way that fits, or an error.

In stage 0 DeepSpeed saves the optimizer's state by number, without names. Each group is taken to hold its parameters
in the order of the model, as groups made from `named_parameters()` do; shapes, and fp32 masters that round to the
weights, tell which. No files here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from zerolith.errors import CheckpointError

MAX_WAYS = 20_000  # open ways at a time


class Lane(Protocol):
    """A param group's tensors, one after the other."""

    @property
    def length(self) -> int:
        """Where the lane ends."""

    def size(self, name: str) -> int:
        """How far the parameter would go along the lane."""

    def fits(self, name: str, at: int) -> bool:
        """Whether the parameter can lie there."""


class Spot(NamedTuple):
    """Where a parameter lies."""

    lane: int
    at: int


class _Step(NamedTuple):
    ways: int  # 1, or 2 for more than one
    before: tuple[int, ...]
    spot: Spot | None


def match(names: Sequence[str], lanes: Sequence[Lane], *, where: str) -> dict[str, Spot]:
    """The spots of the parameters that are in a lane. Raises CheckpointError if there is no way, or more than one."""
    ends = tuple(lane.length for lane in lanes)
    left = [0]  # elements or tensors that the names from here on can still fill
    for name in reversed(names):
        left.append(left[-1] + max((lane.size(name) for lane in lanes), default=0))
    left.reverse()
    frontier = {(0,) * len(lanes): _Step(1, (), None)}
    history = []
    for index, name in enumerate(names):
        history.append(frontier)
        frontier = _advance(frontier, name, lanes, room=left[index + 1], total=sum(ends))
        if len(frontier) > MAX_WAYS:
            raise _ambiguous(where)
    last = frontier.get(ends)
    if last is None:
        raise CheckpointError(f"{where}: its optimizer's groups fit no choice of the model's parameters; {REMEDY}")
    if last.ways > 1:
        raise _ambiguous(where)
    spots = {}
    for name, step in zip(reversed(names), _back(last, history), strict=True):
        if step.spot is not None:
            spots[name] = step.spot
    return spots


REMEDY = "name the parameters of each group in `group_names`"


def _advance(
    frontier: dict[tuple[int, ...], _Step], name: str, lanes: Sequence[Lane], *, room: int, total: int
) -> dict[tuple[int, ...], _Step]:
    """The states after `name` has been put into each lane that it fits, or into none."""
    after: dict[tuple[int, ...], _Step] = {}
    for state, step in frontier.items():
        moves: list[tuple[tuple[int, ...], Spot | None]] = [(state, None)]
        for index, lane in enumerate(lanes):
            at, size = state[index], lane.size(name)
            if at + size <= lane.length and lane.fits(name, at):
                moves.append((state[:index] + (at + size,) + state[index + 1 :], Spot(index, at)))
        for target, spot in moves:
            if total - sum(target) > room:
                continue
            known = after.get(target)
            ways = min(2, step.ways + (known.ways if known else 0))
            after[target] = known._replace(ways=ways) if known else _Step(ways, state, spot)
    return after


def _back(last: _Step, history: list[dict[tuple[int, ...], _Step]]) -> list[_Step]:
    steps = [last]
    for frontier in reversed(history[1:]):
        steps.append(frontier[steps[-1].before])
    return steps


def _ambiguous(where: str) -> CheckpointError:
    return CheckpointError(f"{where}: stage 0 saves no names, and its optimizer's groups fit in several ways; {REMEDY}")
