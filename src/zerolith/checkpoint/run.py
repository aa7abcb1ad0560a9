"""A whole run as the content of a checkpoint, and back: units, optimizer, schedule, counters, data, random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.checkpoint.content import Content
from zerolith.checkpoint.loading import Arrivals, StoppedElsewhere, fill_tensors
from zerolith.checkpoint.manifest import Manifest, ParameterRecord
from zerolith.checkpoint.mismatch import UNKNOWN, check_optimizer, check_states, matching_names
from zerolith.checkpoint.reader import Reader
from zerolith.checkpoint.rng import rng_state, set_rng_state
from zerolith.checkpoint.training_state import (
    Sharded,
    add_buffers,
    add_parameters,
    groups_of,
)
from zerolith.checkpoint.values import from_json, to_json
from zerolith.checkpoint.versions import libraries
from zerolith.comm import Comm, agree
from zerolith.errors import CheckpointDamagedError, CheckpointError, DistributedError
from zerolith.optim import original
from zerolith.precision import LossScaler


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What decides the next step. `scheduler` and `loader` are anything with state_dict(), or None."""

    sharded: Sharded
    scaler: LossScaler
    scheduler: Any
    loader: Any
    counters: Mapping[str, Any]  # JSON; `since_step` tells micro-batches that wait for their step

    @property
    def module(self) -> nn.Module:
        return self.sharded.model.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What of a checkpoint is loaded; the model's values and buffers always are."""

    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    progress: bool = True  # counters, loss scale, data position, random numbers


class Collected(NamedTuple):
    """This rank's content, and what only rank 0's manifest takes."""

    content: Content
    parameters: dict[str, ParameterRecord]
    state: dict[str, Any]  # JSON
    libraries: dict[str, str]


def collect(run: Run, client_state: Mapping[str, Any], *, exclude_frozen: bool) -> Collected:
    """Everything of the run, by reference: nothing is copied. Collective.

    Raises CheckpointError, on every rank, for what a checkpoint cannot hold.
    """
    comm, optimizer = run.sharded.model.comm, run.sharded.optimizer
    with_gradients = bool(run.counters["since_step"])
    content = Content()
    tensors: dict[str, Tensor] = {}  # rank 0's
    error: Exception | None = None
    state: dict[str, Any] = {}
    versions: dict[str, str] = {}
    try:
        versions = libraries()
        extra = {path: each.get_extra_state() for path, each in _with_extra_state(run.module).items()}
        state = {
            "counters": dict(run.counters),
            "scaler": to_json(run.scaler.state_dict(), where="scaler", tensors=tensors),
            "scheduler": to_json(_state_dict(run.scheduler), where="scheduler", tensors=tensors),
            "loader": to_json(_state_dict(run.loader), where="loader", tensors=tensors),
            "optimizer": None,
            "extra_state": to_json(extra, where="extra_state", tensors=tensors),
            "client": to_json(dict(client_state), where="client_state", tensors=tensors),
        }
        if optimizer is not None:
            groups = groups_of(optimizer, "param_groups", tensors)
            state["optimizer"] = {"class": class_name(optimizer.inner), "groups": groups}
        add_parameters(content, run.sharded, exclude_frozen=exclude_frozen, with_gradients=with_gradients)
        content.rank_state = _rank_state(run, content)
    except Exception as caught:  # the other ranks must not wait for this one
        error = caught
        content.close()
    agree(comm, error, doing="collecting a checkpoint", kind=CheckpointError)
    add_buffers(content, run.sharded)
    if comm.rank == 0:
        content.add_tensors(tensors)
    return Collected(content, run.sharded.parameters(), state, versions)


def check(run: Run, manifest: Manifest, wants: Wants) -> set[str]:
    """The parameters that the checkpoint has values for. Changes nothing. Collective.

    Raises CheckpointError, on every rank, if the checkpoint is not of this model and optimizer.
    """
    optimizer = run.sharded.optimizer
    error: Exception | None = None
    names: set[str] = set()
    try:
        names = matching_names(manifest, run.sharded.parameters(), strict=wants.strict)
        gone = set(_of(manifest, "extra_state") or {}) - set(_with_extra_state(run.module))
        if wants.strict and gone:
            raise CheckpointError(f"the checkpoint has extra state of modules that the model lacks: {sorted(gone)}")
        if wants.optimizer and optimizer is not None:
            groups = [group["params"] for group in groups_of(optimizer, "", {})]
            check_optimizer(_of(manifest, "optimizer"), class_name(optimizer.inner), groups)
            if _of(manifest, "optimizer")["class"] == UNKNOWN:
                check_states(manifest, class_name(optimizer.inner))
    except Exception as caught:  # the other ranks must not wait for this one
        error = caught
    agree_on_checkpoint(run.sharded.model.comm, error, doing="loading a checkpoint")
    return names


def restore(run: Run, reader: Reader, wants: Wants, names: set[str]) -> dict[str, Any]:
    """Bring the run to the checkpoint's state, except for counters; returns its client_state.

    Collective over ranks that read the same one.

    names: what `check` has returned. Raises CheckpointError, on every rank; the run is a mixture then.
    """
    takes_states = wants.optimizer and run.sharded.optimizer is not None
    arrivals, error = Arrivals(run.sharded), None
    client_state: dict[str, Any] = {}
    try:
        with torch.no_grad():
            fill_tensors(run.sharded, reader, names, arrivals, takes_states=takes_states)
        _restore_values(run, reader, wants, takes_states=takes_states)
        client_state = dict(from_json(_of(reader.manifest, "client"), tensor=reader.tensor))
    except DistributedError:
        raise  # a rank is gone: there is nobody to agree with
    except StoppedElsewhere:
        pass
    except Exception as caught:  # as above
        error = caught
        arrivals.give_up()
    arrivals.settle()
    agree_on_checkpoint(run.sharded.model.comm, error, doing="loading a checkpoint")
    return client_state


def agree_on_checkpoint(comm: Comm, error: Exception | None, *, doing: str) -> None:
    """Raise on every rank if any rank brings an error: CheckpointDamagedError if any is one. Collective."""
    is_damage = comm.max([float(isinstance(error, CheckpointDamagedError))], name=f"damage while {doing}")[0]
    agree(comm, error, doing=doing, kind=CheckpointDamagedError if is_damage else CheckpointError)


def class_name(optimizer: Optimizer) -> str:
    """Module and name of the optimizer's class."""
    kind = original(type(optimizer))
    return f"{kind.__module__}.{kind.__qualname__}"


def _of(manifest: Manifest, name: str) -> Any:  # JSON
    return manifest.state.get(name)


def _restore_values(run: Run, reader: Reader, wants: Wants, *, takes_states: bool) -> None:
    manifest, optimizer = reader.manifest, run.sharded.optimizer

    def decoded(value: Any) -> Any:
        return from_json(value, tensor=reader.tensor)

    modules = _with_extra_state(run.module)
    for name, value in decoded(_of(manifest, "extra_state") or {}).items():
        if name in modules:
            modules[name].set_extra_state(value)
    if takes_states and optimizer is not None:
        saved = _of(manifest, "optimizer")
        for group, each in zip(optimizer.inner.param_groups, saved["groups"], strict=True):
            options = decoded(each["options"])
            is_ours = saved["class"] != UNKNOWN  # else there are options of which this class knows nothing
            group.update({key: value for key, value in options.items() if is_ours or key in group})
        _restore_used(run, manifest)
    saved_schedule = decoded(_of(manifest, "scheduler"))
    if wants.scheduler and run.scheduler is not None and saved_schedule is not None:
        run.scheduler.load_state_dict(saved_schedule)
        if not takes_states and optimizer is not None:
            # A schedule may go on from the rates that it finds in the groups, and those were not loaded.
            for group, lr in zip(optimizer.inner.param_groups, saved_schedule.get("_last_lr", ()), strict=False):
                group["lr"] = lr
    if wants.progress:
        run.scaler.resume(decoded(_of(manifest, "scaler")))
        saved_loader = decoded(_of(manifest, "loader"))
        if run.loader is not None and saved_loader is not None:
            run.loader.load_state_dict(saved_loader)
        ranks = _of(manifest, "ranks")
        if run.sharded.rank < len(ranks) and ranks[run.sharded.rank]["rng"] is not None:
            set_rng_state(decoded(ranks[run.sharded.rank]["rng"]), run.sharded.model.comm.device)


def _rank_state(run: Run, content: Content) -> Any:  # JSON
    tensors: dict[str, Tensor] = {}
    rng = to_json(rng_state(run.sharded.model.comm.device), where=f"rank/{run.sharded.rank}/rng", tensors=tensors)
    content.add_tensors(tensors)
    used = [
        member.name
        for own in run.sharded.model.gradients
        for member, used in zip(own.section.members, own.used, strict=True)
        if used
    ]
    return {"rng": rng, "used": used}


def _restore_used(run: Run, manifest: Manifest) -> None:
    """Which parameters had a gradient in the unfinished accumulation, and whether some rank's own is not reduced."""
    ranks = [set(each["used"]) for each in _of(manifest, "ranks")]
    model = run.sharded.model
    if len(ranks) == model.comm.size:
        used = ranks[run.sharded.rank]
    else:
        used = set().union(*ranks) if run.sharded.rank == 0 else set()
    for own in model.gradients:
        own.used = [member.name in used for member in own.section.members]
    model.reducer.partial = any(
        name.startswith("rank/") and name.split("/", 3)[2] == "gradient" for name in manifest.tensors
    )


def _state_dict(source: Any) -> Any:
    return source.state_dict() if hasattr(source, "state_dict") else None


def _with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep something beside parameters and buffers, by path."""
    default = nn.Module.get_extra_state
    return {path: each for path, each in module.named_modules() if type(each).get_extra_state is not default}
