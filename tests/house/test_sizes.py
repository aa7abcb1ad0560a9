"""Files and functions fit the eye, and no file does what the house does not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from house import floors

HOUSE = floors.read_house(floors.TOP)
EVERY_MODULE = pytest.mark.parametrize("name", HOUSE)


@EVERY_MODULE
def test_files_have_at_most_400_lines(name: str) -> None:
    assert not [*floors.long_files(HOUSE[name])]


@EVERY_MODULE
def test_functions_have_at_most_60_lines(name: str) -> None:
    assert not [*floors.long_functions(HOUSE[name])]


@EVERY_MODULE
@pytest.mark.parametrize("rule", floors.MANNERS, ids=lambda rule: rule.__name__)
def test_manners(name: str, rule: Callable[[floors.Module], Iterator[str]]) -> None:
    assert not [*rule(HOUSE[name])]


# --- the checker itself, on small sources -----------------------------------------------------------


def module(source: str, *, part: str = "layout") -> floors.Module:
    return floors.Module(name=f"zerolith.{part}", path=Path(f"zerolith/{part}.py"), source=source)


def function(num_lines: int) -> str:
    return "\n".join(["def f():", *["    x = 1"] * (num_lines - 1), ""])


def test_a_long_file_is_found() -> None:
    assert not [*floors.long_files(module("x = 1\n" * 400))]
    assert [*floors.long_files(module("x = 1\n" * 401))]


@pytest.mark.parametrize("wrap", ["{}", "@mark\n{}", "async {}"])
def test_a_long_function_is_found(wrap: str) -> None:
    assert not [*floors.long_functions(module(wrap.format(function(60))))]
    (finding,) = floors.long_functions(module(wrap.format(function(61))))
    assert "f() has 61 lines, 60 allowed" in finding


def test_a_long_method_is_found() -> None:
    method = "class C:\n" + "".join(f"    {line}\n" for line in function(61).splitlines())
    assert [*floors.long_functions(module(method))]


BAD_MANNERS = [
    (floors.silent_asserts, "assert x"),
    (floors.evaluated_text, "eval('1')"),
    (floors.evaluated_text, "builtins.exec('1')"),
    (floors.unpickling, "import pickle"),
    (floors.unpickling, "def f():\n    from pickle import loads"),
    (floors.unpickling, "import torch\ntorch.load(path)"),
    (floors.unpickling, "import torch as t\nload = t.load"),
    (floors.unpickling, "from torch import load"),
    (floors.prints, "print(1)"),
    (floors.bare_ignores, "x = 1  # type: ignore  (and no code)"),
    (floors.bare_ignores, "x = 1  #type:ignore # why"),
    (floors.bare_ignores, "x = 1  # noqa  (and no code)"),
    (floors.missing_docstrings, ""),
    (floors.missing_docstrings, "'''A module.'''\ndef f(): ..."),
    (floors.missing_docstrings, "'''A module.'''\nclass C: ..."),
]
GOOD_MANNERS = [
    (floors.silent_asserts, "assert x, 'phase is REST after release()'"),
    (floors.evaluated_text, "model.eval()"),
    (floors.unpickling, "import json\njson.load(file)"),
    (floors.prints, "logger.info('print(1)')"),
    (floors.bare_ignores, "x = 1  # type: ignore[attr-defined]  # no stub for it"),
    (floors.bare_ignores, "x = '# type: ignore in a string'"),
    (floors.bare_ignores, "x = 1  # noqa: E501"),
    (floors.missing_docstrings, "'''A module.'''\ndef _f(): ...\ndef g():\n    '''G.'''\n    def h(): ..."),
    (floors.missing_docstrings, "'''A module.'''\n@typing.overload\ndef f(x: int) -> int: ..."),
]


@pytest.mark.parametrize(("rule", "source"), BAD_MANNERS)
def test_bad_manners_are_found(rule: Callable[[floors.Module], Iterator[str]], source: str) -> None:
    (finding,) = rule(module(source))
    assert finding.startswith("zerolith/layout.py:")


@pytest.mark.parametrize(("rule", "source"), GOOD_MANNERS)
def test_good_manners_are_not(rule: Callable[[floors.Module], Iterator[str]], source: str) -> None:
    assert not [*rule(module(source))]


def test_only_the_command_line_prints() -> None:
    assert not [*floors.prints(module("print(1)", part="cli"))]
