"""The code in the README and in the docs runs as it stands."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from harness import run_ranks

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def run_block(source: str) -> None:
    exec(compile(source, "example", "exec"), {})


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
@pytest.mark.parametrize("world", [1, 2])
def test_the_examples_run(page: str, world: int) -> None:
    for block in python_blocks(page):
        run_ranks(world, run_block, block)


def test_both_readmes_show_the_same_example() -> None:
    assert python_blocks("README.md") == python_blocks("README.zh.md")


def printed_by(source: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_block(source)
    return out.getvalue()


def test_the_tutorial_prints_what_it_says() -> None:
    text = (ROOT / "docs/tutorial.md").read_text()
    pairs = re.findall(r"```python\n(.*?)```(.*?)```output\n(.*?)```", text, flags=re.DOTALL)
    assert len(pairs) == 5
    for source, between, output in pairs:
        world = 2 if "On two ranks" in between else 1
        assert run_ranks(world, printed_by, source)[0] == output
