"""A checkpoint of DeepSpeed as one of ours, from which an engine goes on training, at any stage on any number of ranks.

[Note: imported] DeepSpeed's files do not tell the class of the optimizer, so the checkpoint says that it is unknown
(UNKNOWN in mismatch.py): an engine takes it if its optimizer needs no other states than there are, and of the options
takes those that its param groups have. Nor is there anything of random numbers and of where the data was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zerolith.checkpoint.content import Content, Part
from zerolith.checkpoint.disk import Disk
from zerolith.checkpoint.folder import check_tag
from zerolith.checkpoint.manifest import NAMES, ParameterRecord
from zerolith.checkpoint.mismatch import UNKNOWN
from zerolith.checkpoint.progress import Meter, Tell
from zerolith.checkpoint.saver import Job, Saver
from zerolith.checkpoint.values import to_json
from zerolith.checkpoint.versions import libraries
from zerolith.comm import Comm
from zerolith.errors import CheckpointError
from zerolith.layout import Range

if TYPE_CHECKING:
    from zerolith.checkpoint.deepspeed import DeepSpeedCheckpoint, ForeignParameter

logger = logging.getLogger("zerolith")

SWITCHES = ("foreach", "fused", "capturable", "differentiable")  # say how a step is computed, not what


def import_deepspeed(
    source: Path | str,
    target: Path | str,
    tag: str | None = None,
    *,
    new_tag: str | None = None,
    group_names: Sequence[Sequence[str]] | None = None,
    tell: Tell | None = None,
) -> Path:
    """Write the checkpoint `tag` (or the newest) of the DeepSpeed folder `source` into the job's folder `target`.

    Returns the new checkpoint's folder; it has the old tag unless `new_tag` is given, and `latest` names it. Needs no
    DeepSpeed and runs nothing that is in its files; holds one tensor at a time. `group_names`: parameters in each of
    the optimizer's param groups, for files of stage 0, which do not always tell. Raises CheckpointError, also if the
    tag is there already, and CheckpointLockedError if a job writes to `target`.
    """
    from zerolith.checkpoint.deepspeed import read_deepspeed  # twenty modules that a training run does not need

    checkpoint = read_deepspeed(source, tag, group_names=group_names)
    checkpoint.verify()
    return write_imported(checkpoint, Path(target).absolute(), new_tag or checkpoint.home.resolve().name, tell=tell)


def write_imported(checkpoint: DeepSpeedCheckpoint, folder: Path, tag: str, *, tell: Tell | None = None) -> Path:
    """Write what has been read as the checkpoint `tag` of `folder`; returns where it lies. Raises CheckpointError."""
    home = folder / check_tag(tag)
    if folder.resolve() == checkpoint.home.resolve().parent:
        raise CheckpointError(f"{folder}: DeepSpeed's checkpoints are here; import into another folder")
    if home.exists():
        raise CheckpointError(f"{home}: it exists already; remove it, or choose another tag")
    content, state = _content(checkpoint, tell)
    job = Job(
        folder=folder,
        tag=tag,
        step=checkpoint.step,
        content=content,
        parameters=_records(checkpoint),
        state=state,
        libraries=libraries(),
        read_back=True,
    )
    saver = Saver(Comm(None, torch.device("cpu")), Disk(), threads=1)
    try:
        saver.save(job)
    finally:
        saver.close()
    return home


def _content(checkpoint: DeepSpeedCheckpoint, tell: Tell | None) -> tuple[Content, dict[str, Any]]:
    """All tensors, most of them still to be made, and all values as JSON."""
    content = Content(rank_state={"rng": None, "used": []})
    tensors: dict[str, Tensor] = {}
    meter = Meter(tell, 0)
    for name, parameter in checkpoint.parameters.items():
        wide = _wide(parameter)
        content.parts.append(_part(f"value/{name}", parameter, wide, parameter.value, meter))
        for key, load in parameter.state.items():
            content.parts.append(_part(f"optimizer/{key}/{name}", parameter, wide, load, meter))
        if parameter.state or parameter.scalars:
            scalars = {key: torch.tensor(value) for key, value in parameter.scalars.items()}
            content.optimizer[name] = to_json(scalars, where=name, tensors={})
    meter.total = sum(part.data.nbytes for part in content.parts)
    content.add_tensors({f"buffer/{name}": buffer for name, buffer in checkpoint.buffers.items()})
    state = {
        "counters": _counters(checkpoint),
        "scaler": _scaler(checkpoint.loss_scale),
        "scheduler": to_json(_scheduler(checkpoint), where="scheduler", tensors=tensors),
        "loader": None,
        "optimizer": _optimizer(checkpoint),
        "extra_state": {},
        "client": _client_state(checkpoint.client_state, tensors),
    }
    content.add_tensors(tensors)
    return content, state


def _wide(parameter: ForeignParameter) -> torch.dtype:
    """What holds the parameter's values and states without loss: fp32 for trained ones, as masters are."""
    stored = parameter.dtype or torch.float32
    return torch.promote_types(stored, torch.float32) if parameter.trained else stored


def _part(key: str, parameter: ForeignParameter, dtype: torch.dtype, load: Callable[[], Tensor], meter: Meter) -> Part:
    def make() -> Tensor:
        tensor = load()
        if torch.promote_types(tensor.dtype, dtype) != dtype or tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{key!r} is {tensor.dtype} {tuple(tensor.shape)}; {dtype} {parameter.shape} expected"
            )
        meter(tensor.numel() * dtype.itemsize)
        return tensor.to(dtype).contiguous().view(-1)

    numel = torch.Size(parameter.shape).numel()
    place = torch.empty(numel, dtype=dtype, device="meta")
    return Part(name=key, shape=parameter.shape, range=Range(0, numel), data=place, make=make)


def _records(checkpoint: DeepSpeedCheckpoint) -> dict[str, ParameterRecord]:
    aliases: dict[str, list[str]] = {}
    for alias, name in checkpoint.aliases.items():
        aliases.setdefault(name, []).append(alias)
    return {
        name: ParameterRecord(
            shape=list(parameter.shape),
            dtype=NAMES[parameter.dtype or torch.float32],
            trained=parameter.trained,
            aliases=sorted(aliases.get(name, ())),
        )
        for name, parameter in checkpoint.parameters.items()
    }


def _counters(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    """Between two steps, as an engine would be after its last."""
    return {
        "global_steps": checkpoint.step,
        "global_samples": checkpoint.samples,
        "skipped_steps": checkpoint.skipped_steps,
        "train_batch_size": checkpoint.samples // checkpoint.step if checkpoint.step else 0,
        "per_step": 1,
        "total": checkpoint.step,
        "origin": checkpoint.step,
        "since_step": 0,
        "after_backward": False,
        "asked": True,
        "manual": None,
    }


def _scaler(scale: float | None) -> dict[str, Any]:
    """A run whose own scale is dynamic goes on from this one; 1 is what DeepSpeed says where it scales nothing."""
    is_scaled = scale is not None and scale > 1
    return {"dynamic": is_scaled, "scale": scale if is_scaled else 1.0, "good_steps": 0, "hysteresis_left": 2}


def _scheduler(checkpoint: DeepSpeedCheckpoint) -> Any:
    """DeepSpeed's own schedules count from -1; as torch's state, with which ours go on."""
    saved = checkpoint.scheduler
    if not isinstance(saved, Mapping) or not isinstance(saved.get("last_batch_iteration"), int):
        return saved
    taken = saved["last_batch_iteration"] + 1
    rates = [group.options["lr"] for group in checkpoint.param_groups if "lr" in group.options]
    return {"last_epoch": taken, "_step_count": taken + 1, "_last_lr": rates}


def _optimizer(checkpoint: DeepSpeedCheckpoint) -> dict[str, Any] | None:
    if not checkpoint.param_groups:
        return None
    groups = [
        {"params": sorted(group.names or ()), "options": to_json(_options(group.options), where="group", tensors={})}
        for group in checkpoint.param_groups
    ]
    return {"class": UNKNOWN, "groups": groups}


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in saved.items() if key not in (*SWITCHES, "step")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}


def _client_state(saved: Mapping[Any, Any], tensors: dict[str, Tensor]) -> Any:  # JSON
    """What can be kept of it; what cannot, such as objects of the client's classes, is said."""
    kept = {}
    for key, value in saved.items():
        found: dict[str, Tensor] = {}
        try:
            to_json({key: value}, where="client_state", tensors=found)
        except CheckpointError as error:
            logger.warning("%s; it is left out", error)
        else:
            kept[key] = value
    return to_json(kept, where="client_state", tensors=tensors)
