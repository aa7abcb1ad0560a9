"""Checkpoints of ZeRO stages 1 to 3: every rank has a flat part of the fp32 weights and of the optimizer's state.

[Note: flat groups] A flat group is one vector. In stages 1 and 2 there is one for each param group: its parameters in
the order of `param_shapes`, cut into equal partitions, one a rank, the last ones padded. In stage 3 there are one or
more for each param group, and each rank's vector holds an equal part of every parameter, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zerolith.checkpoint.deepspeed.assemble import Piece, Wanted, check, cut, gather, refuse, reshaped, split
from zerolith.checkpoint.deepspeed.checkpoint import ForeignParameter, Load
from zerolith.checkpoint.deepspeed.model_state import ModelState, Shape, item
from zerolith.checkpoint.deepspeed.optimizer_state import OptimizerState, Restored, loss_scale, optimizer_state
from zerolith.checkpoint.deepspeed.plain import meaning
from zerolith.checkpoint.deepspeed.records import StoredTensor, brief
from zerolith.checkpoint.deepspeed.unpickle import read_torch_file
from zerolith.errors import CheckpointDamagedError, CheckpointError
from zerolith.layout import Range


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's optim_states file."""

    path: Path
    stage: int
    num_ranks: int
    flat: list[StoredTensor]  # fp32 weights of each flat group, without padding in stages 1 and 2
    padding: list[int]  # of each flat group; its optimizer state may be longer than its weights by so much
    gaps: list[list[int]] | None  # elements after each parameter of each flat group, for its alignment
    optimizer: OptimizerState
    loss_scale: float | None


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """What the ranks have of one flat group, in their order."""

    where: Path  # the first rank's file
    flat: list[StoredTensor | None]
    states: dict[str, list[StoredTensor | None] | None]  # None: not one number for each element
    scalars: dict[str, float]

    def parameter(
        self, name: str, pieces: list[Piece], *, shape: Shape, weights: StoredTensor | None
    ) -> ForeignParameter:
        """One of its parameters."""
        state: dict[str, Load] = {}
        for key, sources in self.states.items():
            wanted = Wanted(where=self.where, parameter=name, state=key, shape=shape)
            if sources is None:
                why = "is not one number for each element in this checkpoint, so it cannot be put together"
                state[key] = partial(refuse, wanted, why=why)
            else:
                state[key] = partial(gather, sources, pieces, wanted)
        return ForeignParameter(
            shape=shape,
            dtype=None if weights is None else weights.dtype,
            trained=True,
            value=partial(gather, self.flat, pieces, Wanted(where=self.where, parameter=name, shape=shape)),
            state=state,
            scalars=self.scalars,
        )


def read_shard(path: Path) -> Shard:
    """Read one rank's file. Raises CheckpointError."""
    content = item(read_torch_file(path), "optimizer_state_dict", dict, where=path)
    split_by_parameter = "fp32_flat_groups" in content
    flat = item(
        content, "fp32_flat_groups" if split_by_parameter else "single_partition_of_fp32_groups", list, where=path
    )
    stage = meaning(content.get("zero_stage", 1))
    counts = content.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if stage not in (1, 2, 3) or (stage == 3) != split_by_parameter:
        raise CheckpointDamagedError(f"{path}: it says that it is of ZeRO stage {brief(stage)}")
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise CheckpointDamagedError(f"{path}: it does not say how many ranks have saved")
    if len(set(counts)) > 1:
        most, least = max(counts), min(counts)
        raise CheckpointError(
            f"{path}: its groups are split over {most} and {least} ranks: experts, which cannot be read"
        )
    if not all(isinstance(each, StoredTensor) and len(each.shape) == 1 for each in flat):
        raise CheckpointDamagedError(f"{path}: its fp32 weights are no flat tensors")
    state = content.get("optimizer_state_dict" if split_by_parameter else "base_optimizer_state")
    return Shard(
        path=path,
        stage=stage,
        num_ranks=counts[0],
        flat=flat,
        padding=_integers(content.get("group_paddings"), len(flat)),
        gaps=content.get("param_alignment_paddings"),
        optimizer=optimizer_state(state, where=path, step=content.get("base_optimizer_state_step")),
        loss_scale=loss_scale(content),
    )


def read_partitioned(model: ModelState, others: Sequence[ModelState], paths: Sequence[Path]) -> Restored:
    """The parameters of a checkpoint of stage 1, 2 or 3. `others` are the model_states of ranks 1, 2, ... in stage 3.

    Raises CheckpointError.
    """
    shards = [read_shard(path) for path in paths]
    _check_agreement(model, others, shards)
    first = shards[0]
    groups = model.groups
    if groups is None or len(groups) != len(first.flat):
        raise CheckpointDamagedError(
            f"{first.path}: it has {len(first.flat)} flat groups, and {model.path} describes {len(groups or [])}"
        )
    trained: dict[str, ForeignParameter] = {}
    for index, group in enumerate(groups):
        like = _flat_group(shards, index)
        for name, pieces in _places(shards, index, group).items():
            trained[name] = like.parameter(name, pieces, shape=group[name], weights=model.module.get(name))
    parameters = {name: trained.get(name) or frozen(name, model, others, first.stage) for name in model.names}
    in_groups = [{name for index in numbers for name in groups[index]} for numbers in _numbers(first)]
    return Restored(
        parameters=parameters,
        param_groups=first.optimizer.param_groups(
            [tuple(filter(group.__contains__, parameters)) for group in in_groups]
        ),
        zero_stage=first.stage,
        loss_scale=first.loss_scale,
        files=tuple(paths),
    )


def frozen(name: str, model: ModelState, others: Sequence[ModelState], stage: int) -> ForeignParameter:
    """A parameter that is not the optimizer's: whole in the weights, in stage 3 in pieces. Raises CheckpointError."""
    weights = model.module.get(name)
    if stage < 3 and weights is not None:
        load: Load = partial(reshaped, weights, Wanted(where=model.path, parameter=name, shape=weights.shape))
        return ForeignParameter(shape=weights.shape, dtype=weights.dtype, trained=False, value=load)
    shape = model.frozen.get(name)
    if shape is None:
        raise CheckpointError(
            f"{model.path}: the frozen parameter {name!r} has no values in this checkpoint, only a place"
        )
    sources = [state.frozen_pieces.get(name) for state in (model, *others)]
    numel = math.prod(shape)
    pieces = split(numel, offset=0, num_ranks=len(sources)) if stage == 3 else cut(Range(0, numel), partition=numel)
    wanted = Wanted(where=model.path, parameter=name, shape=shape)
    check(sources, pieces, wanted)
    load = partial(gather, sources, pieces, wanted)
    dtype = sources[0].dtype if sources[0] is not None else None
    return ForeignParameter(shape=shape, dtype=dtype, trained=False, value=load)


def _check_agreement(model: ModelState, others: Sequence[ModelState], shards: Sequence[Shard]) -> None:
    """All ranks' files are of one checkpoint, and all are there."""
    first = shards[0]
    _check_count(first.path, len(shards), first.num_ranks)
    if model.num_ranks != first.num_ranks:
        raise CheckpointError(
            f"{first.path}: it is split over {first.num_ranks} of {model.num_ranks} ranks (MiCS), which cannot be read"
        )
    if first.stage == 3:
        _check_count(model.path, len(others) + 1, first.num_ranks)
    for other in others:
        if other.step != model.step:
            raise CheckpointDamagedError(f"{other.path}: it is of step {other.step}, and {model.path} of {model.step}")
    for shard in shards[1:]:
        if (shard.stage, shard.num_ranks, len(shard.flat)) != (first.stage, first.num_ranks, len(first.flat)):
            raise CheckpointDamagedError(f"{shard.path}: it is not of the same checkpoint as {first.path}")
        for index in range(len(first.flat)):
            if shard.optimizer.scalars(index) != first.optimizer.scalars(index):
                raise CheckpointDamagedError(
                    f"{shard.path}: its optimizer is at another step than that of {first.path}"
                )


def _check_count(path: Path, found: int, num_ranks: int) -> None:
    """Raise CheckpointDamagedError unless there are so many files; `path` is that of rank 0."""
    if found != num_ranks:
        name = path.name.replace("zero_pp_rank_0_", f"zero_pp_rank_{min(found, num_ranks)}_")
        what = "is missing" if found < num_ranks else "is left from another checkpoint"
        raise CheckpointDamagedError(f"{path.with_name(name)}: it {what}; {num_ranks} ranks have saved")


def _places(shards: Sequence[Shard], index: int, group: dict[str, Shape]) -> dict[str, list[Piece]]:
    """Where the parameters of flat group `index` lie. Raises CheckpointDamagedError if they do not fill it."""
    first, num_ranks = shards[0], len(shards)
    gaps = _integers(
        first.gaps[index] if isinstance(first.gaps, list) and index < len(first.gaps) else None, len(group)
    )
    places = {}
    offset = 0
    for (name, shape), gap in zip(group.items(), gaps, strict=True):
        numel = math.prod(shape)
        if first.stage == 3:
            places[name] = split(numel, offset=offset, num_ranks=num_ranks)
            offset += -(-numel // num_ranks)
        else:
            places[name] = cut(Range(offset, offset + numel), partition=first.flat[index].numel)
            offset += numel + gap
    held = sum(shard.flat[index].numel for shard in shards)
    # DeepSpeed pads the flat groups of stages 1 and 2 to twice the ranks, and strips most of it again.
    unit = num_ranks if first.stage == 3 else 2 * num_ranks
    needed = offset * num_ranks if first.stage == 3 else offset
    if -(-needed // unit) != -(-held // unit):
        why = "; states on NVMe cannot be read" if not held else ""
        raise CheckpointDamagedError(
            f"{first.path}: flat group {index} has {held} elements on all ranks, and its parameters {needed}{why}"
        )
    for name, pieces in places.items():
        wanted = Wanted(where=first.path, parameter=name, shape=group[name])
        check([shard.flat[index] for shard in shards], pieces, wanted)
    return places


def _flat_group(shards: Sequence[Shard], index: int) -> FlatGroup:
    states = {}
    for key in shards[0].optimizer.tensors(index):
        sources = [shard.optimizer.tensors(index).get(key) for shard in shards]
        fits = all(_elementwise(shard, index, source) for shard, source in zip(shards, sources, strict=True))
        states[key] = sources if fits else None
    flat: list[StoredTensor | None] = [shard.flat[index] for shard in shards]
    return FlatGroup(where=shards[0].path, flat=flat, states=states, scalars=shards[0].optimizer.scalars(index))


def _elementwise(shard: Shard, index: int, source: StoredTensor | None) -> bool:
    """Whether a state has an element for each of the rank's weights, padding or not."""
    numel = shard.flat[index].numel
    return source is None or source.shape in ((numel,), (numel + shard.padding[index],))


def _numbers(shard: Shard) -> list[list[int]]:
    """The flat groups of each param group. Raises CheckpointDamagedError."""
    numbers = shard.optimizer.numbers
    if sorted(index for each in numbers for index in each) != list(range(len(shard.flat))):
        raise CheckpointDamagedError(
            f"{shard.path}: the optimizer's param groups do not hold its {len(shard.flat)} tensors"
        )
    return numbers


def _integers(values: Any, length: int) -> list[int]:
    """A list of so many counts; zeros if the file has none such."""
    whole = (
        isinstance(values, list) and len(values) == length and all(type(each) is int and each >= 0 for each in values)
    )
    return values if whole else [0] * length
