"""Optimizers and schedulers by their names in the config: ours, and all of torch's."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zerolith.errors import ConfigError
from zerolith.optim import one_pass
from zerolith.optim.lamb import Lamb
from zerolith.optim.lion import Lion
from zerolith.optim.lr import SCHEDULES
from zerolith.optim.muon import Muon, split
from zerolith.optim.start_up import without_compiler

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # torch has one fused pass for these, on CPU and CUDA
OURS: dict[str, type[Optimizer]] = {"Lamb": Lamb, "Lion": Lion, "Muon": Muon}
IDLE = ("cycle_first_stair_count", "cycle_second_stair_count")  # of OneCycle: read by DeepSpeed and not used
ADAM_ONLY = ("torch_adam", "adam_w_mode", "bias_correction")  # DeepSpeed's own parameters of Adam and AdamW


def build_optimizer(
    kind: str, params: Mapping[str, Any], groups: Iterable[Any], model: nn.Module, *, in_one_pass: bool = False
) -> Optimizer:
    """The optimizer named `kind` (any case) over `groups` (tensors or group dicts) of `model`.

    As in DeepSpeed, "Adam" decouples the weight decay (AdamW) unless `adam_w_mode` is false, and neither decays
    unless told. `in_one_pass`: our kernels step it, if they know it; else torch's fused code, if there is any. Muon
    takes the hidden matrices and leaves the rest to AdamW. Raises ConfigError with the nearest right name.
    """
    known = _subclasses(Optimizer, torch.optim) | OURS
    name = {name.lower(): name for name in known}.get(kind.lower())
    if name is None:
        raise ConfigError(f"optimizer.type: {kind!r} is no optimizer of zerolith or torch.optim{_nearest(kind, known)}")
    options = dict(params)
    if name in ("Adam", "AdamW"):
        if not params.get("bias_correction", True):
            raise ConfigError(
                f"optimizer.params.bias_correction: torch.optim.{name} always corrects the bias; leave it out"
            )
        if params.get("adam_w_mode", True):
            name = "AdamW"
        options = {"weight_decay": 0.0} | {key: value for key, value in params.items() if key not in ADAM_ONLY}
    groups = list(groups)
    chosen = {name for each in (options, *groups) if isinstance(each, dict) for name in each}
    if in_one_pass and name in one_pass.CLASSES and not chosen & {*one_pass.NOT_KNOWN}:
        known[name] = one_pass.CLASSES[name]
    elif name in FUSED and not {"fused", "foreach", "differentiable"} & options.keys():
        options["fused"] = True
    return _construct(known[name], split(model, groups) if name == "Muon" else groups, options, "optimizer.params")


def build_scheduler(kind: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """The schedule `kind` over `optimizer`: DeepSpeed's, or a class of torch.optim.lr_scheduler.

    Of DeepSpeed's own parameters `last_batch_iteration` is torch's `last_epoch`, and those in IDLE do nothing there.

    Raises ConfigError with the nearest name.
    """
    known = _subclasses(LRScheduler, torch.optim.lr_scheduler) | SCHEDULES
    if kind not in known:
        raise ConfigError(
            f"scheduler.type: {kind!r} is no schedule of zerolith or torch.optim.lr_scheduler{_nearest(kind, known)}"
        )
    if kind in SCHEDULES:
        renamed = {"last_batch_iteration": "last_epoch"}
        params = {renamed.get(name, name): value for name, value in params.items() if name not in IDLE}
    return _construct(known[kind], optimizer, params, "scheduler.params")


def _construct(factory: Any, first: Any, options: Mapping[str, Any], path: str) -> Any:
    known = list(inspect.signature(factory).parameters)[1:]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{path}.{name}: {factory.__name__} has no such parameter{_nearest(name, known)}; "
                f"it takes {', '.join(known)}"
            )
    try:
        with without_compiler():
            return factory(first, **options)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{path}: {factory.__name__} refuses them: {error}") from error


def _subclasses(base: type, module: ModuleType) -> dict[str, type]:
    """The classes in `module` that are made from `base`, by name."""
    classes = inspect.getmembers(module, inspect.isclass)
    return {name: each for name, each in classes if issubclass(each, base) and each is not base}


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
