"""Activation checkpointing: computing activations again in backward instead of keeping them.

The work is torch.utils.checkpoint's (non-reentrant, random numbers kept). Blocks chosen by the config are checkpointed
inside their own `forward`: hooks on a module, such as those that gather its parameters, stay outside, so a block is
not gathered once more to be computed again. What a block keeps may stay in host memory (`memory/offload.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint as torch_checkpoint,
    create_selective_checkpoint_contexts,
)

from zerolith.errors import ConfigError, UsageError
from zerolith.forward import Forward
from zerolith.memory.offload import Block, Kept, Offload, Saved

_ATEN = torch.ops.aten
# What costs much to compute and little to keep: with the policy "selective" their results stay, see `_is_kept`.
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

TORCHS_OWN = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How `checkpoint` works."""

    selective: bool = False  # keep the results of matrix products, attention and convolutions
    offload: Offload | None = None  # keep what is kept in host memory


_configured: list[Options] = []  # at most one; backward's threads see it, too
_offloading: ContextVar[bool] = ContextVar("inside a block that is offloaded", default=False)


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

        section = load_config(deepspeed_config, allow_auto=True).activation_checkpointing
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
    _configured[:] = [Options(offload=Offload() if on_host else None)]


def is_configured() -> bool:
    """Whether `configure` was called."""
    return bool(_configured)


def reset() -> None:
    """Take `configure` back."""
    _configured.clear()


def drop_idle_memory() -> None:
    """Let the host memory go that `checkpoint` has kept for the next tensors. What is saved stays."""
    for options in _configured:
        if options.offload is not None:
            options.offload.drop_idle_memory()


def checkpoint(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), whose activations are computed again in backward. Tensors may be at any depth.

    What callers of torch's checkpoint may pass and is not the function's (TORCHS_OWN) has no effect.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in TORCHS_OWN}
    return _run(_configured[0] if _configured else Options(), function, *args, **kwargs)


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


def _run(options: Options, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if options.offload is not None and not _offloading.get():
        return _run_offloaded(options.offload.block(), options.selective, function, *args, **kwargs)
    chosen: dict[str, Any] = {}
    if options.selective:
        chosen["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return _run_by_torch(function, args, kwargs, **chosen)


def _run_offloaded(block: Block, selective: bool, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    chosen: dict[str, Any] = {}
    if selective:
        results: list[Result] = []
        chosen["context_fn"] = lambda: (_Keep(results, block), _Reuse(results))
    with block.hooks():
        return _run_by_torch(partial(_inside, function), args, kwargs, **chosen)


def _run_by_torch(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], **chosen: Any) -> Any:
    """All arguments are positional for torch: it keeps the random states only of those's devices, and saves only those
    where hooks can see it."""
    names, positional = list(kwargs), len(args)

    def call(*given: Any) -> Any:
        return function(*given[:positional], **dict(zip(names, given[positional:], strict=True)))

    return torch_checkpoint(call, *args, *kwargs.values(), use_reentrant=False, **chosen)


def _is_kept(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:  # operation: torch's OpOverload
    """Whether the results of this call stay with the policy "selective".

    Not if it draws random numbers: they would not be drawn again, and all that follow in the block would be others.
    """
    if operation not in EXPENSIVE:
        return False
    names = [argument.name for argument in operation._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return not given.get("dropout_p", 0.0)


def _policy(_: Any, operation: Any, /, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keeps = _is_kept(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _inside(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Checkpoints inside of `function` keep to the outer one: it computes again what they keep. Each time it runs."""
    token = _offloading.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        _offloading.reset(token)


class Result(NamedTuple):
    """What an expensive operation gave."""

    operation: Any  # torch's OpOverload
    value: Any  # its tensors packed, at any depth


class _Keep(TorchDispatchMode):
    """Runs a block and keeps the results of its expensive operations, as torch's selective checkpointing does."""

    def __init__(self, results: list[Result], block: Block) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._results = results
        self._block = block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if _is_kept(func, args, kwargs or {}):
            self._results.append(Result(func, tree_map_only(Tensor, self._block.pack, value)))
        return value


class _Reuse(TorchDispatchMode):
    """Runs a block again with the results that `_Keep` kept of it."""

    def __init__(self, results: list[Result]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._results = results
        self._next = 0

    def __enter__(self) -> Any:
        self._next = 0  # a retained graph comes here more than once
        return super().__enter__()  # type: ignore[no-untyped-call]  # untyped in torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        if self._next >= len(self._results) or self._results[self._next].operation is not func:
            raise UsageError(f"a checkpointed block computed {func} in backward that it did not compute in forward")
        self._next += 1
        return tree_map_only((Kept, Saved), lambda packed: packed.get(), self._results[self._next - 1].value)


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
