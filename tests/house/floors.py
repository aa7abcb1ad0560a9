"""The house: which floor each part of zerolith stands on, and what breaks the rules of the house.

Everything is read from the source text; nothing is imported, so that imports in functions and under
TYPE_CHECKING count like any other. Each check yields findings, one line each: where, what, what to do.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).parents[2] / "src" / "zerolith"

# A part (a module, or a package with all that is in it) imports only from parts before it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "layout", "partitioning", "config"),  # 0: pure
    ("kernels", "comm", "memory", "precision"),  # 1: one process and its surroundings
    (
        "forward",
        "outputs",
        "buffer",
        "departures",
        "redistribute",
        "parameter",
        "member",
        "section",
    ),  # 2: sharded storage
    ("unit", "schedule", "pace", "term", "gradients", "wrap", "hooks", "sharded_model"),  # 3: the ZeRO mechanism
    ("optim",),  # 4: optimizers
    ("zero", "checkpointing", "checkpoint", "integrity"),  # 5: what composes with units
    (
        "data",
        "observe",
        "micro_steps",
        "status",
        "batches",
        "checkpoints",
        "lending",
        "placement",
        "ending",
        "engine",
        "initialize",
    ),  # 6: the facade
    ("cli",),  # 7: clients of the facade
)
ROOF = ""  # the package's own __init__: the public names, from any part
FLOOR_OF: dict[str, int] = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
ORDER: list[str] = [*FLOOR_OF, ROOF]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

COLLECTIVES_LIVE_IN = {"comm"}
# What any part above floor 0 may take from torch.distributed: none of it is a collective.
HARMLESS_SUBMODULES = {"checkpoint", "device_mesh", "elastic", "pipelining", "run", "tensor"}
UNPICKLERS = {"cloudpickle", "dill", "marshal", "pickle", "shelve", "_pickle"}
BARE_IGNORE = re.compile(r"#\s*(type:\s*ignore(?!\[)|noqa(?!:))", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Mention(NamedTuple):
    """A dotted name in a source, absolute: `from .a import b` in p.c mentions p.a.b."""

    name: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file."""

    name: str  # dotted, from the top package on
    path: Path
    source: str = field(repr=False)

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    @property
    def package(self) -> str:
        """The package against which this file's relative imports are meant."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def part(self) -> str:
        """The entry of FLOORS that this file belongs to, or ROOF."""
        return (self.name.split(".") + [ROOF])[1]

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"


def read_house(top: Path) -> dict[str, Module]:
    """All modules of the package in the folder `top`, by dotted name."""
    modules = {}
    for path in sorted(top.rglob("*.py")):
        inner = path.relative_to(top.parent).with_suffix("").parts
        name = ".".join(inner[:-1] if inner[-1] == "__init__" else inner)
        modules[name] = Module(name=name, path=path, source=path.read_text(encoding="utf-8"))
    return modules


# --- what a file mentions ---------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of attributes on a name, else nothing."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def absolute(module: Module, name: str, *, level: int) -> str:
    """`name` after `level` leading dots in `module`, from the top package on."""
    if level == 0:
        return name
    package = module.package.split(".")
    return ".".join([*package[: len(package) - level + 1], *filter(None, [name])])


def imports(module: Module) -> Iterator[Mention]:
    """Every import, wherever it stands, import_module() and __import__() of a literal included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Mention(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node.module or "", level=node.level)
            for alias in node.names:
                yield Mention(source if alias.name == "*" else f"{source}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                name = literal.value.lstrip(".")
                yield Mention(absolute(module, name, level=len(literal.value) - len(name)), node.lineno)


def uses(module: Module) -> Iterator[Mention]:
    """Every import, and every chain of attributes on a name, longest form only; aliases resolved."""
    yield from imports(module)
    alias_of = {
        alias.asname: alias.name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    chains = [node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in chains}
    for node in chains:
        if id(node) not in inner:
            head, _, rest = dotted(node).partition(".")
            yield Mention(f"{alias_of.get(head, head)}.{rest}", node.lineno)


def called(module: Module) -> Iterator[Mention]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(node.func):
            yield Mention(dotted(node.func), node.lineno)


# --- floors and cycles ------------------------------------------------------------------------------


def part_of(modules: Mapping[str, Module], mention: str, *, top: str) -> str | None:
    """The part of the house that a mention leads to; None for the world outside."""
    head, _, rest = mention.partition(".")
    if head != top:
        return None
    part = rest.partition(".")[0]
    return part if part in FLOOR_OF or f"{top}.{part}" in modules else ROOF


def floor_name(part: str) -> str:
    return "the roof" if part == ROOF else f"floor {FLOOR_OF[part]}"


def upward_imports(modules: Mapping[str, Module], module: Module) -> Iterator[str]:
    """Imports from a later part of the same floor, or from a higher floor."""
    own, top = module.part, module.name.partition(".")[0]
    if own not in ORDER:
        yield f"{module.at(1)}: say on which floor {own!r} lives (FLOORS in tests/house/floors.py)"
        return
    for name, line in imports(module):
        part = part_of(modules, name, top=top)
        if own == ROOF:
            if part is not None and any(word.startswith("_") for word in name.split(".")):
                yield f"{module.at(line)}: {name} is private; the roof shows public names only"
        elif part in ORDER and part != own and ORDER.index(part) > ORDER.index(own):
            yield (
                f"{module.at(line)}: {module.name} ({floor_name(own)}) imports {name} ({floor_name(part)}, "
                "after it); move what both need below them, or have it passed in"
            )


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Module name -> names of the modules that it imports, the longest that a mention leads to."""
    graph: dict[str, set[str]] = {}
    for module in modules.values():
        found = graph.setdefault(module.name, set())
        for name, _ in imports(module):
            words = name.split(".")
            prefixes = (".".join(words[:end]) for end in range(len(words), 0, -1))
            found.update([prefix for prefix in prefixes if prefix in modules][:1])
    return graph


def import_cycles(modules: Mapping[str, Module]) -> Iterator[str]:
    """One cycle of imports, if there is any."""
    try:
        graphlib.TopologicalSorter(import_graph(modules)).prepare()
    except graphlib.CycleError as error:
        yield f"import cycle {' <- '.join(error.args[1])}; move what both need into a file below them"


def collectives(module: Module) -> Iterator[str]:
    """torch.distributed on floor 0, and collectives anywhere but in comm/."""
    if module.part in COLLECTIVES_LIVE_IN:
        return
    pure = FLOOR_OF.get(module.part) == 0
    for name, line in uses(module):
        words = name.split(".")
        if words[:2] != ["torch", "distributed"]:
            continue
        if pure:
            yield f"{module.at(line)}: {name} on floor 0, which knows of no other processes"
        elif not set(words[2:3]) & HARMLESS_SUBMODULES:
            yield f"{module.at(line)}: {name} outside comm/; call zerolith.comm"


# --- sizes ------------------------------------------------------------------------------------------


def long_files(module: Module) -> Iterator[str]:
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{module.at(1)}: {lines} lines, {MAX_FILE_LINES} allowed; which second noun is in it?"


def long_functions(module: Module) -> Iterator[str]:
    """Functions over the limit, from `def` to the last line, docstring included."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                where = module.at(node.lineno)
                yield f"{where}: {node.name}() has {lines} lines, {MAX_FUNCTION_LINES} allowed"


# --- manners ----------------------------------------------------------------------------------------


def silent_asserts(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"{module.at(node.lineno)}: assert without a message; a user's mistake raises instead"


def evaluated_text(module: Module) -> Iterator[str]:
    for name, line in called(module):
        if name.removeprefix("builtins.") in {"eval", "exec"}:
            yield f"{module.at(line)}: {name}() runs text as code; make it a table"


def unpickling(module: Module) -> Iterator[str]:
    """What would run code from a file: pickle and its kin, torch.load."""
    for name, line in uses(module):
        if name == "torch.load" or name.split(".")[0] in UNPICKLERS:
            yield f"{module.at(line)}: {name} unpickles; load tensors and JSON instead"


def prints(module: Module) -> Iterator[str]:
    if module.part != "cli":
        for name, line in called(module):
            if name == "print":
                yield f"{module.at(line)}: print() outside cli/; log it, or return it"


def bare_ignores(module: Module) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        if token.type == tokenize.COMMENT and BARE_IGNORE.search(token.string):
            yield f"{module.at(token.start[0])}: {token.string!r} names no code; say which, and why"


def missing_docstrings(module: Module) -> Iterator[str]:
    """Modules, and public classes and functions at their top level, that say nothing of themselves."""
    if not ast.get_docstring(module.tree):
        yield f"{module.at(1)}: the module has no docstring; say what it is and what it may not know"
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            overload = any(dotted(mark).endswith("overload") for mark in node.decorator_list)
            if not overload and not ast.get_docstring(node):
                yield f"{module.at(node.lineno)}: {node.name} is public and has no docstring"


MANNERS: tuple[Callable[[Module], Iterator[str]], ...] = (
    silent_asserts,
    evaluated_text,
    unpickling,
    prints,
    bare_ignores,
    missing_docstrings,
)
