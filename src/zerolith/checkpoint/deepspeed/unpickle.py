"""A reader of the pickles in torch.save's files that runs nothing: it interprets the opcodes and calls what it knows.

[Note: inert] Pickle is a program whose instructions may import and call anything. Here GLOBAL and its kin give the
name as a Symbol; REDUCE and its kin look that name up in a table of our own functions (known.MAKERS) and give an
Unknown otherwise. No name from the file reaches import, getattr or a call.

[Note: bounds] What a file may cost is bounded by its size: each opcode costs one unit, each copy of a collection its
length, and the result, with everything that is shared counted as often as it is reached, may not have more nodes than
MAX_NODES, nor be nested deeper than MAX_DEPTH, nor contain itself. So whoever walks the result recursively is safe.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zerolith.checkpoint.deepspeed.archive import Archive, open_archive
from zerolith.checkpoint.deepspeed.known import STORAGES, call, checked_key, name
from zerolith.checkpoint.deepspeed.records import Storage, Symbol, Unknown, brief, children
from zerolith.errors import CheckpointError

MAX_PICKLE_BYTES = 2**28
MAX_UNITS = 10_000_000  # opcodes; a tensor takes some sixty
MAX_NODES = 5_000_000
MAX_DEPTH = 100
MAX_BITS = 2**14  # of a number
# What may go wrong when the bytes are not those of a pickle.
NONSENSE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, RecursionError, Warning)


def read_torch_file(path: Path) -> Any:
    """What was given to torch.save: plain values, with tensors as StoredTensor and all other objects as Unknown.

    Raises CheckpointError, and CheckpointDamagedError for a file that is not whole or was made to do harm.
    """
    archive = open_archive(path)
    order = archive.records.get("byteorder")
    if order is not None and order.nbytes < 16 and archive.read_all(order) != sys.byteorder.encode():
        raise CheckpointError(
            f"{path}: it was written on a machine of another byte order than this one ({sys.byteorder})"
        )
    record = archive.records["data.pkl"]
    if record.nbytes > MAX_PICKLE_BYTES:
        raise archive.damaged("data.pkl", f"{record.nbytes} bytes; the structure of a checkpoint has less")
    machine = Machine(archive)
    try:
        value = machine.run(archive.read_all(record))
        check_bounds(value)
    except NONSENSE as error:
        raise archive.damaged("data.pkl", f"it is no pickle of a checkpoint: {error}") from error
    return value


class Machine:
    """The stack, the memo and the storages of one pickle."""

    archive: Archive
    stack: list[Any]
    outer: list[list[Any]]  # the stacks below each mark
    memo: dict[int, Any]
    storages: dict[str, Storage]
    units: int  # left to spend

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.stack, self.outer, self.memo, self.storages = [], [], {}, {}
        self.units = MAX_UNITS

    def run(self, pickle: bytes) -> Any:
        """The value that the pickle leaves. Raises CheckpointError, or one of NONSENSE."""
        for opcode, argument, _ in pickletools.genops(pickle):
            self.spend(1)
            if opcode.name == "STOP":
                break
            act = ACTIONS.get(opcode.name)
            if act is not None:
                act(self, argument)
                continue
            make = MAKES.get(opcode.name)
            if make is None:
                raise ValueError(f"opcode {opcode.name}, which no file of torch.save has")
            made = make(self, argument)  # which may put another stack in place
            self.stack.append(made)
        if len(self.stack) != 1 or self.outer:
            raise ValueError("it does not leave one value")
        return self.stack[0]

    def spend(self, units: int) -> None:
        self.units -= units
        if self.units < 0:
            raise ValueError("it makes more objects than a checkpoint has")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_tuple(self) -> tuple[Any, ...]:
        value = self.stack.pop()
        if not isinstance(value, tuple):
            raise ValueError(f"arguments in a {type(value).__name__}")
        return value

    def pop_marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        marked, self.stack = self.stack, self.outer.pop()
        return marked

    def storage(self, identity: Any) -> Storage:
        """The storage of a persistent id: ("storage", type, key, device, number of elements)."""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("a persistent id that names no storage")
        _, kind, key, _, numel = identity
        if not isinstance(kind, Symbol) or (kind.module, kind.name) not in STORAGES or not isinstance(key, str):
            raise ValueError(f"a storage of type {brief(kind)}")
        dtype = STORAGES[kind.module, kind.name]
        record = self.archive.records.get(f"data/{key}")
        if record is None:
            raise self.archive.damaged(f"data/{key}", "it is not there, and a tensor needs it")
        if type(numel) is not int or not 0 <= numel * (dtype.itemsize if dtype else 1) <= record.nbytes:
            raise self.archive.damaged(f"data/{key}", f"it has {record.nbytes} bytes for {numel} elements of {kind}")
        made = Storage(archive=self.archive, record=record, dtype=dtype, nbytes=record.nbytes)
        return self.storages.setdefault(f"{key} {dtype}", made)


def check_bounds(root: Any) -> None:
    """Raise ValueError if the value contains itself, is nested too deeply, or unfolds to too many nodes.

    [Note: bounds] Iterative: this is what makes recursion safe for others.
    """
    sizes: dict[int, tuple[int, int]] = {}  # by id: nodes, depth
    open_ids: set[int] = set()
    todo: list[tuple[Any, list[Any] | None]] = [(root, None)]
    while todo:
        value, inner = todo.pop()
        if inner is None:
            if id(value) in sizes:
                continue
            if id(value) in open_ids:
                raise ValueError("a value that contains itself")
            inner = children(value)
            open_ids.add(id(value))
            todo.append((value, inner))
            todo.extend((each, None) for each in inner if id(each) not in sizes)
            continue
        text = len(value) // 16 if isinstance(value, str | bytes | bytearray) else 0
        nodes = 1 + text + sum(sizes[id(each)][0] for each in inner)
        depth = 1 + max((sizes[id(each)][1] for each in inner), default=0)
        if nodes > MAX_NODES:
            raise ValueError("it unfolds to more values than a checkpoint has")
        if depth > MAX_DEPTH:
            raise ValueError(f"values nested more than {MAX_DEPTH} deep")
        open_ids.discard(id(value))
        sizes[id(value)] = (nodes, depth)


# --- what each opcode does --------------------------------------------------------------------------


def _same(_: Machine, argument: Any) -> Any:
    return argument


def _number(_: Machine, argument: int) -> int:
    if argument.bit_length() > MAX_BITS:
        raise ValueError(f"a number of {argument.bit_length()} bits")
    return argument


def _memo(machine: Machine, argument: int) -> Any:
    return machine.memo[argument]


def _global(_: Machine, argument: str) -> Any:
    module, _space, attribute = argument.partition(" ")
    return name(Symbol(module, attribute))


def _stack_global(machine: Machine, _: None) -> Any:
    attribute, module = machine.pop(), machine.pop()
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise ValueError("a name that is no text")
    return name(Symbol(module, attribute))


def _extension(_: Machine, argument: int) -> Any:
    return Symbol("copyreg", f"extension {argument}")


def _instance(machine: Machine, argument: str) -> Any:
    return call(_global(machine, argument), tuple(machine.pop_marked()), machine.spend)


def _reduce(machine: Machine, _: None) -> Any:
    args, callee = machine.pop_tuple(), machine.pop()
    return call(callee, args, machine.spend)


def _new_with_keywords(machine: Machine, _: None) -> Any:
    kwargs, args, callee = machine.pop(), machine.pop_tuple(), machine.pop()
    if not isinstance(kwargs, dict):
        raise ValueError("keyword arguments that are no dict")
    machine.spend(len(kwargs))
    return call(callee, args, machine.spend, kwargs=kwargs)


def _object(machine: Machine, _: None) -> Any:
    callee, *args = machine.pop_marked()
    return call(callee, tuple(args), machine.spend)


def _dict(machine: Machine, _: None) -> Any:
    target: dict[Any, Any] = {}
    _fill(target, machine.pop_marked())
    return target


def _frozen_set(machine: Machine, _: None) -> Any:
    return frozenset(checked_key(each) for each in machine.pop_marked())


def _last(count: int) -> Callable[[Machine, Any], Any]:
    return lambda machine, _: tuple([machine.pop() for _ in range(count)][::-1])


MAKES: Mapping[str, Callable[[Machine, Any], Any]] = {  # what each opcode puts on the stack
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _number),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"), _same),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _same),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "BYTEARRAY8"), _same),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _memo),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
    "NONE": lambda machine, _: None,
    "NEWTRUE": lambda machine, _: True,
    "NEWFALSE": lambda machine, _: False,
    "DUP": lambda machine, _: machine.stack[-1],
    "EMPTY_LIST": lambda machine, _: [],
    "EMPTY_DICT": lambda machine, _: {},
    "EMPTY_SET": lambda machine, _: set(),
    "EMPTY_TUPLE": lambda machine, _: (),
    "LIST": lambda machine, _: machine.pop_marked(),
    "TUPLE": lambda machine, _: tuple(machine.pop_marked()),
    **{f"TUPLE{count}": _last(count) for count in (1, 2, 3)},
    "DICT": _dict,
    "FROZENSET": _frozen_set,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _instance,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "OBJ": _object,
    "BINPERSID": lambda machine, _: machine.storage(machine.pop()),
}


def _nothing(_: Machine, _argument: Any) -> None:
    return None


def _mark(machine: Machine, _: None) -> None:
    machine.outer.append(machine.stack)
    machine.stack = []


def _drop(machine: Machine, _: None) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_marked()


def _drop_marked(machine: Machine, _: None) -> None:
    machine.pop_marked()


def _put(machine: Machine, argument: int | None) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _append(machine: Machine, _: None) -> None:
    element = machine.pop()
    _extend(machine.stack[-1], [element])


def _append_marked(machine: Machine, _: None) -> None:
    elements = machine.pop_marked()
    _extend(machine.stack[-1], elements)


def _extend(target: Any, elements: list[Any]) -> None:
    if isinstance(target, set):
        target.update(checked_key(each) for each in elements)
    elif isinstance(target, list):
        target.extend(elements)
    elif isinstance(target, Unknown):
        target.elements.extend(elements)
    else:
        raise ValueError(f"elements for a {type(target).__name__}")


def _set_item(machine: Machine, _: None) -> None:
    value, key = machine.pop(), machine.pop()
    _fill(machine.stack[-1], [key, value])


def _set_marked(machine: Machine, _: None) -> None:
    items = machine.pop_marked()
    _fill(machine.stack[-1], items)


def _fill(target: Any, items: list[Any]) -> None:
    entries = target.entries if isinstance(target, Unknown) else target
    if not isinstance(entries, dict) or len(items) % 2:
        raise ValueError(f"entries for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        entries[checked_key(key)] = value


def _build(machine: Machine, _: None) -> None:
    """Give an object its state. Attributes of an OrderedDict, such as a state dict's `_metadata`, are left out."""
    state = machine.pop()
    target = machine.stack[-1]
    if isinstance(target, Unknown):
        target.state = state
    elif not isinstance(target, dict):
        raise ValueError(f"a state for a {type(target).__name__}")


ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {  # what the other opcodes do
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    "MARK": _mark,
    "POP": _drop,
    "POP_MARK": _drop_marked,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    "APPEND": _append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _append_marked),
    "SETITEM": _set_item,
    "SETITEMS": _set_marked,
    "BUILD": _build,
}
