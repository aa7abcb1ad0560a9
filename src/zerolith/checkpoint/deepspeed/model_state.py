"""What a model_states file of DeepSpeed says: names, shapes, counters, and weights as far as they are whole there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from zerolith.checkpoint.deepspeed.records import StoredTensor, brief
from zerolith.checkpoint.deepspeed.unpickle import read_torch_file
from zerolith.errors import CheckpointDamagedError, CheckpointError

Value = TypeVar("Value")
Shape = tuple[int, ...]

# The keys that DeepSpeed writes; all others are the client's.
OWN_KEYS = frozenset(
    {
        *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"),
        *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
        *("num_experts", "ds_autoep_layers", "autoep_layers", "folding", "universal_checkpoint_info"),
        *("sparse_tensor_module_names", "csr_tensor_module_names"),  # of earlier versions
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """One model_states file."""

    path: Path
    step: int
    samples: int
    skipped_steps: int
    num_ranks: int  # that data is split over, and optimizer states from stage 1 on
    module: dict[str, StoredTensor]  # of shape (0,) for parameters in stage 3
    buffer_names: frozenset[str]
    groups: list[dict[str, Shape]] | None  # trained parameters as they lie in the flat groups; None in stage 0
    frozen: dict[str, Shape]  # empty before stage 2
    frozen_pieces: dict[str, StoredTensor]  # this rank's in stage 3, else whole
    shared: dict[str, str]  # another name of a parameter -> its name; empty in stage 0
    optimizer: Any  # stage 0 only
    scheduler: Any
    client: dict[Any, Any]

    @property
    def names(self) -> list[str]:
        """Parameters in the order of the model, each under one name."""
        own = [name for name in self.module if name not in self.buffer_names]
        named = [name for group in self.groups or [] for name in group] + list(self.frozen)
        aliases = self.aliases
        return [name for name in dict.fromkeys(own + named) if name not in aliases]

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of parameters; in stage 0, which does not say, of those that are the same tensor in the file."""
        if self.groups is not None:
            named = {name for group in self.groups for name in group} | set(self.frozen)
            shapes = {name: tensor.shape for name, tensor in self.module.items()}
            known = named | shapes.keys()
            found = {alias: name for alias, name in self.shared.items() if alias not in named and name in known}
            # Parameters without elements all have one address, and DeepSpeed takes them for one.
            return {alias: name for alias, name in found.items() if shapes.get(alias) == shapes.get(name)}
        first: dict[Any, str] = {}
        same = {}
        for name, tensor in self.module.items():
            if tensor.numel and name not in self.buffer_names and first.setdefault(tensor.spec, name) != name:
                same[name] = first[tensor.spec]
        return same


def read_model_state(path: Path) -> ModelState:
    """Read a model_states file. Raises CheckpointError."""
    content = item({"the file": read_torch_file(path)}, "the file", dict, where=path)
    _refuse_parallel(content, where=path)
    module = content.get("module")
    if not isinstance(module, dict):
        raise CheckpointError(f"{path}: it has no weights: this checkpoint is of a pipeline, which cannot be read")
    groups = content.get("param_shapes")
    return ModelState(
        path=path,
        step=_count(content, "global_steps", where=path),
        samples=_count(content, "global_samples", where=path, default=0),
        skipped_steps=_count(content, "skipped_steps", where=path, default=0),
        num_ranks=_count(content, "dp_world_size", where=path),
        module=_tensors(module),
        buffer_names=frozenset(
            name for name in item(content, "buffer_names", list, where=path) if isinstance(name, str)
        ),
        groups=None if groups is None else [_shapes(group, where=path) for group in _list(groups)],
        frozen=_shapes(content.get("frozen_param_shapes") or {}, where=path),
        frozen_pieces=_tensors(item(content, "frozen_param_fragments", dict, where=path, default={})),
        shared={
            alias: name
            for alias, name in item(content, "shared_params", dict, where=path, default={}).items()
            if isinstance(alias, str) and isinstance(name, str) and alias != name
        },
        optimizer=content.get("optimizer"),
        scheduler=content.get("lr_scheduler"),
        client={key: each for key, each in content.items() if key not in OWN_KEYS},
    )


def item(source: Any, key: Any, kind: type[Value], *, where: Path, default: Value | None = None) -> Value:
    """`source[key]`, of this kind; the default if it is None or not there. Raises CheckpointDamagedError."""
    value = source.get(key) if isinstance(source, Mapping) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise CheckpointDamagedError(f"{where}: {key!r} is {type(value).__name__} in it, and not {kind.__name__}")
    return value


def _count(source: Any, key: str, *, where: Path, default: int | None = None) -> int:
    value = item(source, key, int, where=where, default=default)
    if not 0 <= value < 2**63:
        raise CheckpointDamagedError(f"{where}: {key!r} is {brief(value)}")
    return value


def _refuse_parallel(content: Mapping[Any, Any], *, where: Path) -> None:
    degrees = content.get("checkpoint_parallel_dimensions")
    degrees = degrees if isinstance(degrees, dict) else {}
    for what, degree in (
        ("tensor- or pipeline-parallel ranks", content.get("mp_world_size")),
        ("pipeline stages", degrees.get("pp_degree")),
        ("tensor-parallel ranks", degrees.get("tp_degree")),
    ):
        if isinstance(degree, int) and degree > 1:
            raise CheckpointError(f"{where}: this checkpoint is split over {degree} {what}, which cannot be read")
    if content.get("ds_autoep_layers") or content.get("autoep_layers"):
        raise CheckpointError(
            f"{where}: this checkpoint is of a mixture of experts split over ranks, which cannot be read"
        )


def _list(groups: Any) -> list[Any]:
    return groups if isinstance(groups, list) else [groups]  # one dict before DeepSpeed 0.3.13


def _tensors(named: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    """Without what is no tensor, such as the extra states of modules."""
    return {name: each for name, each in named.items() if isinstance(name, str) and isinstance(each, StoredTensor)}


def _shapes(shapes: Any, *, where: Path) -> dict[str, Shape]:
    if not isinstance(shapes, dict):
        raise CheckpointDamagedError(f"{where}: the shapes of its parameters are in a {type(shapes).__name__}")
    for name, shape in shapes.items():
        whole = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
        if not isinstance(name, str) or not whole or math.prod(size for size in shape if size) >= 2**48:
            raise CheckpointDamagedError(f"{where}: the parameter {brief(name)} has a shape that cannot be")
    return shapes
