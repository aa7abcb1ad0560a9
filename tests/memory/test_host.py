"""What the process does with the pages of freed tensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from zerolith.memory.host import USER_SETTINGS

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

PROGRAM = """
import resource, torch
from zerolith.memory import keep_freed_pages

def finds_fresh_pages(mb):
    for _ in range(8):  # what alignment cuts off leaves the first ones side by side
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(mb * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 100

print({call}, finds_fresh_pages(28), finds_fresh_pages(48))
"""


def refaulted(call: str, **environment: str) -> str:
    """What the call returns, and whether tensors of 28 and of 48 MB lie on fresh pages when they come again."""
    mine = {name: value for name, value in os.environ.items() if name not in USER_SETTINGS}
    program = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=True, env=mine | environment)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("keep_freed_pages(only_small=False)", "True False False"),
        ("keep_freed_pages(only_small=True)", "True False True"),
    ],
)
def test_pages_of_freed_tensors_are_used_again(call, seen):
    assert refaulted(call) == seen


@pytest.mark.parametrize("name", USER_SETTINGS)
def test_what_the_user_set_stands(name):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    assert refaulted("keep_freed_pages(only_small=False)", **{name: value}).startswith("False")
