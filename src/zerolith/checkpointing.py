"""Activation checkpointing: computing activations again in backward instead of keeping them.

The work is torch.utils.checkpoint's (non-reentrant, random numbers kept). Blocks chosen by the config are checkpointed
inside their own `forward`: hooks on a module, such as those that gather its parameters, stay outside, so a block is
not gathered once more to be computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint, create_selective_checkpoint_contexts

from zerolith.errors import ConfigError
from zerolith.forward import Forward

_ATEN = torch.ops.aten
# What costs much to compute and little to keep: with the policy "selective" their results stay.
EXPENSIVE = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How `checkpoint` works."""

    selective: bool = False  # keep the results of matrix products, attention and convolutions
    on_host: bool = False  # keep what is kept in host memory


_configured: ContextVar[Options | None] = ContextVar("zerolith activation checkpointing", default=None)


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Choose what `checkpoint` does from now on, with DeepSpeed's arguments: of them only `checkpoint_in_cpu` acts.

    deepspeed_config: a config of any form, whose section activation_checkpointing counts where an argument is None.
    Raises ConfigError for what is not there: partitioning over ranks, contiguous buffers and profiling.
    """
    on_host = bool(checkpoint_in_cpu)
    if deepspeed_config is not None:
        from zerolith.config import load_config

        section = load_config(deepspeed_config).activation_checkpointing
        on_host = section.cpu_checkpointing if checkpoint_in_cpu is None else on_host
    wanted = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "synchronize": synchronize,
        "profile": profile,
    }
    for name, value in wanted.items():
        if value:
            raise ConfigError(f"checkpointing.configure: {name} is not supported; leave it out")
    _configured.set(Options(on_host=on_host))


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _configured.get() is not None


def reset() -> None:
    """Take `configure` back."""
    _configured.set(None)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), whose activations are computed again in backward. Tensors may be at any depth."""
    return _run(_configured.get() or Options(), function, *args, **kwargs)


def checkpoint_blocks(
    model: nn.Module, *, options: Options, classes: Sequence[str] = (), every: int = 1
) -> list[Forward]:
    """Checkpoint every `every`-th block of `model`; returns them, to be undone.

    Blocks are the instances of `classes` (names, with or without their module's), or, without classes, the modules of
    one class that stand side by side in a container. Blocks inside blocks do not count. Raises ConfigError if there
    is none.
    """
    blocks = list(_blocks(model, frozenset(classes), seen=set()))
    if not blocks:
        known = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        what = f"no module is a {' or '.join(classes)}" if classes else "the model has no container of equal blocks"
        raise ConfigError(f"activation_checkpointing.classes: {what}; choose among {known}")
    return [Forward(block, lambda forward: partial(_run, options, forward)) for block in blocks[::every]]


def _run(options: Options, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    context: AbstractContextManager[Any] = nullcontext()
    if options.on_host:
        context = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    chosen: dict[str, Any] = {}
    if options.selective:
        chosen["context_fn"] = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    with context:
        return torch_checkpoint(function, *args, use_reentrant=False, **chosen, **kwargs)


def _blocks(parent: nn.Module, classes: frozenset[str], *, seen: set[int]) -> Iterator[nn.Module]:
    is_container = isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    repeated = Counter(type(child) for child in parent.children()) if is_container and not classes else Counter()
    for child in parent.children():
        if id(child) in seen:
            continue
        seen.add(id(child))
        kind = type(child)
        is_parted = next(child.children(), None) is not None
        if classes & {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"} or (repeated[kind] > 1 and is_parted):
            yield child
        else:
            yield from _blocks(child, classes, seen=seen)
