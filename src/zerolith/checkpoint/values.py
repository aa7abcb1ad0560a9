"""Python values as JSON and tensors, and back: no pickle, and nothing is lost on the way.

JSON's own values stand for themselves. What JSON lacks is an object with one key that begins with "$":

    {"$float": "nan"}            also "inf", "-inf"
    {"$tuple": [...]}
    {"$dict": [[key, value]]}    a dict with keys that are no strings, or of which one begins with "$"
    {"$counter": [[key, n]]}     collections.Counter
    {"$scalar": ["F32", 1.5]}    a tensor of no dimensions
    {"$tensor": NAME}            a tensor, kept under NAME among the checkpoint's
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zerolith.checkpoint.manifest import DTYPES, NAMES
from zerolith.errors import CheckpointError

MAX_DEPTH = 64


def to_json(value: Any, *, where: str, tensors: dict[str, Tensor]) -> Any:  # returns JSON
    """`value` as JSON; tensors in it go into `tensors` under names that begin with `where`.

    Raises CheckpointError, naming the path from `where` on, for anything that is not JSON's, a tuple or a tensor.
    """
    return _to_json(value, where, where, tensors, 0)


def from_json(value: Any, *, tensor: Callable[[str], Tensor]) -> Any:  # of JSON, what to_json was given
    """Undo `to_json`; `tensor` gives a tensor by its name."""
    if isinstance(value, list):
        return [from_json(item, tensor=tensor) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "") if len(value) == 1 else ""
    if not kind.startswith("$"):
        return {key: from_json(item, tensor=tensor) for key, item in value.items()}
    content = value[kind]
    if kind == "$float":
        return float(content)
    if kind == "$tuple":
        return tuple(from_json(content, tensor=tensor))
    if kind == "$tensor":
        return tensor(content)
    if kind == "$scalar":
        return torch.tensor(from_json(content[1], tensor=tensor), dtype=DTYPES[content[0]])
    if kind in ("$dict", "$counter"):
        made = {from_json(key, tensor=tensor): from_json(item, tensor=tensor) for key, item in content}
        return Counter(made) if kind == "$counter" else made
    raise CheckpointError(f"a value of kind {kind!r} is unknown: it was written by a later version of zerolith")


def _to_json(value: Any, path: str, name: str, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path}: nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, path)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list | tuple):
        items = [_to_json(v, f"{path}[{i}]", f"{name}/{i}", tensors, depth + 1) for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Tensor):
        return _tensor_to_json(value, path, name, tensors)
    if type(value) in (dict, OrderedDict, Counter):
        return _dict_to_json(value, path, name, tensors, depth)
    hint = "take .item() of it" if hasattr(value, "item") else "keep numbers, strings, lists, dicts and tensors only"
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, and a checkpoint holds JSON values and "
        f"tensors only; {hint}"
    )


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path} holds text that is no Unicode (a lone surrogate); decode it rightly") from error
    return str(value)


def _dict_to_json(
    value: Mapping[Any, Any], path: str, name: str, tensors: dict[str, Tensor], depth: int
) -> dict[str, Any]:
    is_plain = type(value) is not Counter and all(isinstance(key, str) and not key.startswith("$") for key in value)
    if is_plain:
        return {
            _text(key, path): _to_json(item, f"{path}[{key!r}]", f"{name}/{key}", tensors, depth + 1)
            for key, item in value.items()
        }
    items = [
        [
            _to_json(key, f"{path}: key {key!r}", f"{name}/{number}.key", tensors, depth + 1),
            _to_json(item, f"{path}[{key!r}]", f"{name}/{number}", tensors, depth + 1),
        ]
        for number, (key, item) in enumerate(value.items())
    ]
    return {"$counter" if type(value) is Counter else "$dict": items}


def _tensor_to_json(value: Tensor, path: str, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.dtype not in NAMES or value.layout is not torch.strided or value.is_meta:
        raise CheckpointError(f"{path} is a {value.layout} tensor of {value.dtype}, which a checkpoint cannot hold")
    value = value.detach()
    if value.dim() == 0 and not value.is_complex():
        number = value.item()
        exact = {"$float": str(number)} if isinstance(number, float) and not math.isfinite(number) else number
        return {"$scalar": [NAMES[value.dtype], exact]}
    while name in tensors:  # names made of keys with slashes may meet
        name += "'"
    tensors[name] = value
    return {"$tensor": name}
