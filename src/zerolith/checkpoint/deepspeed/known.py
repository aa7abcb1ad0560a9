"""The few callables of pickles that give plain values here. All others give an Unknown; none is ever called.

Each entry of MAKERS is written anew for values that come from a file nobody vouches for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zerolith.checkpoint.deepspeed.records import Storage, StoredTensor, Symbol, Unknown, stored

Args = tuple[Any, ...]
Spend = Callable[[int], None]  # takes so much of what one file may cost; raises when it is used up

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
        *("float8_e5m2fnuz", "float8_e8m0fnu", "complex128", "complex64", "complex32", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
    if hasattr(torch, name)
}
STORAGES: Mapping[tuple[str, str], torch.dtype | None] = {
    ("torch", "DoubleStorage"): torch.float64, ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16, ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64, ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16, ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8, ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexDoubleStorage"): torch.complex128, ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch.storage", "UntypedStorage"): None, ("torch", "UntypedStorage"): None,
}  # fmt: skip
MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}  # older names
PLAIN_TENSORS = {
    Symbol("torch", "Tensor"),
    Symbol("torch._tensor", "Tensor"),
    Symbol("torch.nn.parameter", "Parameter"),
}


COPY_UNITS = 16  # what a copied element costs; it took few bytes of the file, or none


def name(symbol: Symbol) -> Any:
    """What a name in a file stands for: a dtype, or the name itself."""
    if symbol.module == "torch" and symbol.name in DTYPES:
        return DTYPES[symbol.name]
    return Symbol(MODULES.get(symbol.module, symbol.module), symbol.name)


def call(callee: Any, args: Args, spend: Spend, *, kwargs: Mapping[str, Any] | None = None) -> Any:
    """The value of `callee(*args)` if the callee is known and the arguments are such as it gets, else an Unknown."""
    maker = MAKERS.get((callee.module, callee.name)) if isinstance(callee, Symbol) and not kwargs else None
    value = maker(args, spend) if maker is not None else None
    return Unknown(callee, args, dict(kwargs or {})) if value is None else value


def _tensor(args: Args, _: Spend) -> Any:
    """_rebuild_tensor(storage, offset, size, stride), and v2 with what autograd adds."""
    if not 4 <= len(args) <= 7 or not isinstance(args[0], Storage) or args[0].dtype is None:
        return None
    return stored(args[0], args[0].dtype, offset=args[1], shape=args[2], stride=args[3])


def _tensor_v3(args: Args, _: Spend) -> Any:
    """_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None)."""
    if not 7 <= len(args) <= 8 or not isinstance(args[0], Storage) or not isinstance(args[6], torch.dtype):
        return None
    return stored(args[0], args[6], offset=args[1], shape=args[2], stride=args[3])


def _parameter(args: Args, _: Spend) -> Any:
    """_rebuild_parameter(data, requires_grad, hooks), and with_state: attributes of a parameter are left out."""
    return args[0] if 3 <= len(args) <= 4 and isinstance(args[0], StoredTensor) else None


def _typed(args: Args, spend: Spend) -> Any:
    """_rebuild_from_type_v2(function, type, arguments, state): plain tensors that had attributes."""
    if len(args) != 4 or args[1] not in PLAIN_TENSORS or not isinstance(args[2], tuple):
        return None
    value = call(args[0], args[2], spend)
    return value if isinstance(value, StoredTensor) else None


def _ordered_dict(args: Args, spend: Spend) -> Any:
    return _filled(OrderedDict(), args, spend)


def _counter(args: Args, spend: Spend) -> Any:
    if len(args) == 1 and isinstance(args[0], dict):
        spend(COPY_UNITS * len(args[0]))
        return dict(args[0])
    return {} if not args else None


def _default_dict(args: Args, spend: Spend) -> Any:
    return _filled({}, args[1:], spend)


def _filled(target: dict[Any, Any], args: Args, spend: Spend) -> Any:
    """The mapping with the pairs that the one argument holds, if there is one."""
    if not args:
        return target
    pairs = args[0]
    if len(args) > 1 or not isinstance(pairs, list | tuple):
        return None
    spend(COPY_UNITS * len(pairs))
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        target[checked_key(pair[0])] = pair[1]
    return target


def _set(args: Args, spend: Spend) -> Any:
    elements = _elements(args, spend)
    return None if elements is None else {checked_key(each) for each in elements}


def _frozen_set(args: Args, spend: Spend) -> Any:
    elements = _elements(args, spend)
    return None if elements is None else frozenset(checked_key(each) for each in elements)


def _tuple(args: Args, spend: Spend) -> Any:
    elements = _elements(args, spend)
    return None if elements is None else tuple(elements)


def _elements(args: Args, spend: Spend) -> list[Any] | tuple[Any, ...] | None:
    if not args:
        return []
    if len(args) == 1 and isinstance(args[0], list | tuple):
        spend(COPY_UNITS * len(args[0]))
        return args[0]
    return None


def _bytes(args: Args, spend: Spend) -> Any:
    """bytes(), and _codecs.encode(text, "latin1"), which is how protocol 2 writes them."""
    if not args:
        return b""
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        spend(len(args[0]) // 64)
        return args[0].encode("latin1")
    return None


def _byte_array(args: Args, spend: Spend) -> Any:
    data = _bytes(args, spend) if len(args) != 1 else args[0]
    if not isinstance(data, bytes):
        return None
    spend(len(data) // 64)
    return bytearray(data)


def _complex(args: Args, _: Spend) -> Any:
    return complex(*args) if len(args) == 2 and all(isinstance(each, float) for each in args) else None


def _device(args: Args, _: Spend) -> Any:
    """As text: "cuda:1"."""
    if len(args) == 1 and isinstance(args[0], str):
        return args[0]
    if len(args) == 2 and isinstance(args[0], str) and type(args[1]) is int:
        return f"{args[0]}:{args[1]}"
    return None


MAKERS: Mapping[tuple[str, str], Callable[[Args, Spend], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch", "Size"): _tuple,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "Counter"): _counter,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _frozen_set,
    ("builtins", "bytes"): _bytes,
    ("_codecs", "encode"): _bytes,
    ("builtins", "bytearray"): _byte_array,
    ("builtins", "complex"): _complex,
}

MAX_KEY_PARTS = 1000
KEYS = (type(None), bool, int, float, complex, str, bytes, Symbol, torch.dtype, StoredTensor, Unknown)


def checked_key(key: Any) -> Any:
    """`key`, which may be a key of a dict or an element of a set: hashing tuples in tuples could take for ever."""
    if type(key) is str:
        return key
    parts = [key]
    for count in range(MAX_KEY_PARTS):
        if not parts:
            return key
        part = parts.pop()
        if isinstance(part, tuple | frozenset) and len(part) <= MAX_KEY_PARTS - count:
            parts.extend(part)
        elif not isinstance(part, KEYS):
            break
    raise ValueError(f"a {type(key).__name__} as a key")
