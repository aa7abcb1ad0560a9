"""The code in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness import run_ranks

ROOT = Path(__file__).parents[1]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def run_block(source: str) -> None:
    exec(compile(source, "README", "exec"), {})


@pytest.mark.parametrize("world", [1, 2])
def test_the_example_runs(world: int) -> None:
    [block] = python_blocks("README.md")
    run_ranks(world, run_block, block)


def test_both_readmes_show_the_same_example() -> None:
    assert python_blocks("README.md") == python_blocks("README.zh.md")
