"""Optimizers and schedulers by their names in the config."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zerolith.errors import ConfigError

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # torch has one fused pass for these, on CPU and CUDA
ADAM_ONLY = ("torch_adam", "adam_w_mode", "bias_correction")  # DeepSpeed's own parameters of Adam and AdamW


def build_optimizer(kind: str, params: Mapping[str, Any], groups: Iterable[Any]) -> Optimizer:
    """The torch optimizer named `kind` (any case) over `groups` (tensors or group dicts).

    As in DeepSpeed, "Adam" decouples the weight decay (AdamW) unless `adam_w_mode` is false, and neither decays
    unless told. The fused implementation is used where torch has one. Raises ConfigError with the nearest right name.
    """
    table = {name.lower(): name for name in dir(torch.optim) if _is_optimizer(getattr(torch.optim, name))}
    name = table.get(kind.lower())
    if name is None:
        raise ConfigError(
            f"optimizer.type: {kind!r} is not an optimizer of torch.optim{_nearest(kind, table.values())}"
        )
    options = dict(params)
    if name in ("Adam", "AdamW"):
        if not params.get("bias_correction", True):
            raise ConfigError(
                f"optimizer.params.bias_correction: torch.optim.{name} always corrects the bias; leave it out"
            )
        decoupled = name == "AdamW" or params.get("adam_w_mode", True)
        name = "AdamW" if decoupled else "Adam"
        options = {"weight_decay": 0.0} | {key: value for key, value in params.items() if key not in ADAM_ONLY}
    if name in FUSED and not {"fused", "foreach", "differentiable"} & options.keys():
        options["fused"] = True
    return _construct(getattr(torch.optim, name), groups, options, "optimizer.params")


def build_scheduler(kind: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """The class `kind` of torch.optim.lr_scheduler over `optimizer`. Raises ConfigError with the nearest name."""
    schedulers = torch.optim.lr_scheduler
    names = [name for name in dir(schedulers) if _is_scheduler(getattr(schedulers, name))]
    if kind not in names:
        raise ConfigError(f"scheduler.type: {kind!r} is not in torch.optim.lr_scheduler{_nearest(kind, names)}")
    return _construct(getattr(schedulers, kind), optimizer, params, "scheduler.params")


def _construct(factory: Any, first: Any, options: Mapping[str, Any], path: str) -> Any:
    known = [name for name in inspect.signature(factory).parameters][1:]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{path}.{name}: {factory.__name__} has no such parameter{_nearest(name, known)}; "
                f"it takes {', '.join(known)}"
            )
    try:
        return factory(first, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{path}: {factory.__name__} refuses them: {error}") from error


def _is_optimizer(candidate: object) -> bool:
    return inspect.isclass(candidate) and issubclass(candidate, Optimizer) and candidate is not Optimizer


def _is_scheduler(candidate: object) -> bool:
    return inspect.isclass(candidate) and issubclass(candidate, LRScheduler) and candidate is not LRScheduler


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
