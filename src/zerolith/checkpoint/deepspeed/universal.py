"""Universal checkpoints, as ds_to_universal.py makes them: a folder for each parameter, a file for each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from zerolith.checkpoint.deepspeed.assemble import Wanted, reshaped
from zerolith.checkpoint.deepspeed.checkpoint import ForeignParameter, Load
from zerolith.checkpoint.deepspeed.model_state import ModelState, Shape, item
from zerolith.checkpoint.deepspeed.optimizer_state import Restored, loss_scale, optimizer_state
from zerolith.checkpoint.deepspeed.partitioned import frozen
from zerolith.checkpoint.deepspeed.plain import meaning, number
from zerolith.checkpoint.deepspeed.records import StoredTensor, brief
from zerolith.checkpoint.deepspeed.unpickle import read_torch_file
from zerolith.errors import CheckpointDamagedError, CheckpointError

OPTIMIZER = "optimizer_state.pt"
VALUE, STEP = "fp32", "step"


def read_universal(model: ModelState, others: Sequence[ModelState], folder: Path) -> Restored:
    """The parameters of a universal checkpoint, whose folder `zero` is `folder`. Raises CheckpointError."""
    path = folder / OPTIMIZER
    content = item({"the file": read_torch_file(path)}, "the file", dict, where=path)
    stage = meaning(content.get("zero_stage", 1))
    if stage not in (1, 2, 3) or model.groups is None:
        raise CheckpointDamagedError(f"{path}: it says that it is of ZeRO stage {brief(stage)}")
    # Stage 3 keeps the first rank's states there, the others only the param groups.
    states = content.get("optimizer_state_dict", {"state": {}, "param_groups": content.get("param_groups")})
    optimizer = optimizer_state(states, where=path)
    trained = {}
    files = [path]
    for index, group in enumerate(model.groups):
        scalars = optimizer.scalars(index)
        for name, shape in group.items():
            own = _files(folder, name)
            trained[name] = _trained(name, shape, own, model, scalars)
            files += own.values()
    names = None
    if all(index < len(model.groups) for each in optimizer.numbers for index in each):
        in_groups = [{name for index in each for name in model.groups[index]} for each in optimizer.numbers]
        names = [tuple(filter(group.__contains__, model.names)) for group in in_groups]
    return Restored(
        parameters={name: trained.get(name) or frozen(name, model, others, stage) for name in model.names},
        param_groups=optimizer.param_groups(names),
        zero_stage=stage,
        loss_scale=loss_scale(content),
        files=tuple(files),
    )


def _files(folder: Path, name: str) -> dict[str, Path]:
    """The files of a parameter by what they hold; none if it never had a gradient."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise CheckpointDamagedError(f"{folder}: a parameter {name[:80]!r} could be no folder here")
    try:
        return {path.stem: path for path in sorted((folder / name).glob("*.pt"))}
    except OSError as error:
        raise CheckpointError(f"{folder / name}: it cannot be listed ({error})") from error


def _trained(
    name: str, shape: Shape, files: dict[str, Path], model: ModelState, scalars: dict[str, float]
) -> ForeignParameter:
    weights = model.module.get(name)
    if VALUE in files:
        value: Load = partial(_load, Wanted(where=files[VALUE], parameter=name, shape=shape))
    elif weights is not None and weights.numel == math.prod(shape):
        value = partial(reshaped, weights, Wanted(where=model.path, parameter=name, shape=shape))
    else:
        raise CheckpointDamagedError(f"{model.path.parent}: the file zero/{name}/{VALUE}.pt is missing")
    if STEP in files and (step := number(_content(files[STEP]))) is not None:
        scalars = {**scalars, "step": step}
    state: dict[str, Load] = {
        key: partial(_load, Wanted(where=path, parameter=name, state=key, shape=shape))
        for key, path in files.items()
        if key not in (VALUE, STEP)
    }
    dtype = None if weights is None else weights.dtype
    return ForeignParameter(shape=shape, dtype=dtype, trained=True, value=value, state=state, scalars=scalars)


def _load(wanted: Wanted) -> Tensor:
    tensor = _content(wanted.where)
    if not isinstance(tensor, StoredTensor):
        raise CheckpointDamagedError(f"{wanted.where}: it holds no tensor, and should hold {wanted}")
    return reshaped(tensor, wanted)


def _content(path: Path) -> Any:
    content = read_torch_file(path)
    return content.get("param") if isinstance(content, dict) else content
