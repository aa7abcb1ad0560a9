"""Checkpoints of stage 0: everything is whole, in one file, but the optimizer knows its tensors by number only.

Three kinds: a plain optimizer of the fp32 weights; one of fp32 masters of each parameter (`fp32_groups`); and one of
flat fp32 masters (`fp32_groups_flat`), one for each param group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.assemble import Piece, Wanted, gather, refuse, reshaped
from zerolith.checkpoint.deepspeed.checkpoint import ForeignParameter, Load
from zerolith.checkpoint.deepspeed.matching import REMEDY, Lane, Spot, match
from zerolith.checkpoint.deepspeed.model_state import ModelState, item
from zerolith.checkpoint.deepspeed.optimizer_state import OptimizerState, Restored, loss_scale, optimizer_state
from zerolith.checkpoint.deepspeed.records import StoredTensor
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range

GroupNames = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """A group of tensors by number: one for each parameter."""

    model: ModelState
    optimizer: OptimizerState
    numbers: list[int]
    masters: list[StoredTensor] | None  # None: the weights are what the optimizer updates

    @property
    def length(self) -> int:
        return len(self.numbers)

    def size(self, name: str) -> int:
        return 1

    def fits(self, name: str, at: int) -> bool:
        shape = self.model.module[name].shape
        if self.masters is not None:
            return self.masters[at].shape == shape and _rounds_to(self.masters[at].load(), self.model.module[name])
        states = self.optimizer.tensors(self.numbers[at]).values()
        return not states or any(state.shape == shape for state in states)

    def parameter(self, name: str, at: int) -> ForeignParameter:
        weights = self.model.module[name]
        number = self.numbers[at]
        value = weights if self.masters is None else self.masters[at]
        state: dict[str, Load] = {}
        for key, each in self.optimizer.tensors(number).items():
            wanted = Wanted(where=self.model.path, parameter=name, state=key, shape=weights.shape)
            whole = each.shape == weights.shape
            why = f"has shape {list(each.shape)} instead"
            state[key] = partial(reshaped, each, wanted) if whole else partial(refuse, wanted, why=why)
        return ForeignParameter(
            shape=weights.shape,
            dtype=weights.dtype,
            trained=True,
            value=partial(reshaped, value, Wanted(where=self.model.path, parameter=name, shape=weights.shape)),
            state=state,
            scalars=self.optimizer.scalars(number),
        )


@dataclass(frozen=True, kw_only=True)
class Flat:
    """A group as one flat tensor, in which its parameters lie one after the other."""

    model: ModelState
    optimizer: OptimizerState
    number: int
    master: StoredTensor
    seen: dict[tuple[str, int], bool] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.master.numel

    def size(self, name: str) -> int:
        return self.model.module[name].numel

    def fits(self, name: str, at: int) -> bool:
        weights = self.model.module[name]
        if not weights.numel:  # DeepSpeed leaves them out
            return False
        if (name, at) not in self.seen:
            piece = Piece(0, Range(at, at + weights.numel))
            value = gather([self.master], [piece], Wanted(where=self.model.path, parameter=name, shape=weights.shape))
            self.seen[name, at] = _rounds_to(value, weights)
        return self.seen[name, at]

    def parameter(self, name: str, at: int) -> ForeignParameter:
        weights = self.model.module[name]
        pieces = [Piece(0, Range(at, at + weights.numel))] if weights.numel else []
        wanted = Wanted(where=self.model.path, parameter=name, shape=weights.shape)
        loads: dict[str, Load] = {
            key: partial(gather, [each], pieces, replace(wanted, state=key))
            for key, each in self.optimizer.tensors(self.number).items()
        }
        return ForeignParameter(
            shape=weights.shape,
            dtype=weights.dtype,
            trained=True,
            value=partial(gather, [self.master], pieces, wanted),
            state=loads,
            scalars=self.optimizer.scalars(self.number),
        )


def read_replicated(model: ModelState, group_names: GroupNames | None) -> Restored:
    """The parameters of a checkpoint of stage 0. Raises CheckpointError.

    `group_names`: the parameters in each of the optimizer's param groups, in order; no groups: leave the optimizer out.
    """
    if missing := [name for name in model.names if name not in model.module]:
        raise CheckpointDamagedError(f"{model.path}: the parameter {missing[0]!r} is named in it, and is not there")
    parameters = {name: _untrained(name, model) for name in model.names}
    if model.optimizer is None or (group_names is not None and not group_names):
        return Restored(parameters, [], zero_stage=0, loss_scale=None, files=())
    content = item({"optimizer": model.optimizer}, "optimizer", dict, where=model.path)
    optimizer = optimizer_state(content.get("optimizer_state_dict", content), where=model.path)
    lanes = _lanes(model, optimizer, content)
    spots = _spots(model, optimizer, lanes, group_names)
    for name, spot in spots.items():
        parameters[name] = lanes[spot.lane].parameter(name, spot.at)
    by_group = [
        sorted((spot.at, name) for name, spot in spots.items() if spot.lane == lane) for lane in range(len(lanes))
    ]
    return Restored(
        parameters=parameters,
        param_groups=optimizer.param_groups([tuple(name for _, name in group) for group in by_group]),
        zero_stage=0,
        loss_scale=loss_scale(content),
        files=(),
    )


def _untrained(name: str, model: ModelState) -> ForeignParameter:
    weights = model.module[name]
    load = partial(reshaped, weights, Wanted(where=model.path, parameter=name, shape=weights.shape))
    return ForeignParameter(shape=weights.shape, dtype=weights.dtype, trained=False, value=load)


def _lanes(model: ModelState, optimizer: OptimizerState, content: dict[str, object]) -> Sequence[Numbered | Flat]:
    flat, whole = content.get("fp32_groups_flat"), content.get("fp32_groups")
    damaged = CheckpointDamagedError(f"{model.path}: the fp32 weights of its optimizer do not fit its param groups")
    numbers = optimizer.numbers
    if isinstance(flat, list):
        if [len(each) for each in numbers] != [1] * len(flat) or not all(_is_flat(each) for each in flat):
            raise damaged
        found = zip(numbers, flat, strict=True)
        return [Flat(model=model, optimizer=optimizer, number=each[0], master=master) for each, master in found]
    masters: list[list[StoredTensor] | None] = [None] * len(numbers)
    if isinstance(whole, list):
        stored = all(
            isinstance(group, list) and all(isinstance(each, StoredTensor) for each in group) for group in whole
        )
        if not stored or [len(group) for group in whole] != [len(each) for each in numbers]:
            raise damaged
        masters = whole
    found_ = zip(numbers, masters, strict=True)
    return [Numbered(model=model, optimizer=optimizer, numbers=each, masters=group) for each, group in found_]


def _spots(
    model: ModelState, optimizer: OptimizerState, lanes: Sequence[Lane], group_names: GroupNames | None
) -> dict[str, Spot]:
    """Where each trained parameter lies: as the caller says, as the optimizer's groups say, or as it must be."""
    known = set(model.names)
    if group_names is None:
        group_names = _own_names(optimizer, known)
    if group_names is None:
        return match(model.names, lanes, where=str(model.path))
    if len(group_names) != len(lanes):
        raise CheckpointError(f"{model.path}: its optimizer has {len(lanes)} param groups, not {len(group_names)}")
    spots: dict[str, Spot] = {}
    for index, (lane, names) in enumerate(zip(lanes, group_names, strict=True)):
        at = 0
        for name in names:
            if name not in known or name in spots:
                raise CheckpointError(f"{model.path}: there is no parameter {name!r}, or it is named twice; {REMEDY}")
            if at + lane.size(name) > lane.length or not lane.fits(name, at):
                raise CheckpointError(
                    f"{model.path}: {name!r} is not parameter {len(spots)} of the optimizer; {REMEDY}"
                )
            spots[name] = Spot(index, at)
            at += lane.size(name)
        if at != lane.length:
            raise CheckpointError(f"{model.path}: param group {index} has more parameters than are named; {REMEDY}")
    return spots


def _own_names(optimizer: OptimizerState, known: set[str]) -> list[list[str]] | None:
    """The names that an optimizer of named parameters has saved, if they are the model's."""
    own = [group.get("param_names") for group in optimizer.groups]
    found = [names for names in own if isinstance(names, list) and all(isinstance(each, str) for each in names)]
    named = [name for names in found for name in names]
    whole = len(found) == len(own) and len(set(named)) == len(named) and known.issuperset(named)
    return found if whole and named else None


def _is_flat(value: object) -> bool:
    return isinstance(value, StoredTensor) and len(value.shape) == 1


def _rounds_to(master: Tensor, weights: StoredTensor) -> bool:
    """Whether the weights are the master in their own precision."""
    return torch.equal(_bits(master.to(weights.dtype)), _bits(weights.load()))


def _bits(tensor: Tensor) -> Tensor:
    """So that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8) if math.prod(tensor.shape) else tensor.view(-1)
