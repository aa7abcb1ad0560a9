"""Buffers for transfers take the memory that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import run_ranks
from zerolith.memory.pages import ALIGNMENT, HUGE_PAGE_BYTES, address_of, page_buffer

SLACK = 256 * 2**10  # for what the interpreter takes meanwhile


def resident() -> int:
    """Bytes of this process that are in memory and in no file."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process what it takes")
@pytest.mark.parametrize("nbytes", [ALIGNMENT, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 2 * ALIGNMENT])
def test_a_buffer_takes_no_more_memory_than_it_has(nbytes: int) -> None:
    def body() -> int:
        before = resident()
        buffers = [page_buffer(nbytes) for _ in range(4)]
        for buffer in buffers:
            assert len(buffer) == nbytes
            assert address_of(buffer) % ALIGNMENT == 0
            for start in range(0, nbytes, ALIGNMENT):
                buffer[start] = 1
        return resident() - before

    assert run_ranks(1, body)[0] <= 4 * nbytes + SLACK
