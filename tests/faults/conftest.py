"""What the tests of faults share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import zerolith.checkpoint.blocks

MEMORY = Path("/dev/shm")
SMALL_BLOCK = 700  # bytes


@pytest.fixture(scope="package", autouse=True)
def _small_blocks() -> Iterator[None]:
    """So that the data files of small models take several writes, as those of large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zerolith.checkpoint.blocks, "WRITE_BYTES", SMALL_BLOCK)
        yield


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory where there is such a thing: what matters here is the order of operations, not the disk."""
    is_usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
    path = Path(tempfile.mkdtemp(prefix="zerolith-", dir=MEMORY if is_usable else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def quick_path() -> Iterator[Path]:
    with _folder() as path:
        yield path


@pytest.fixture(scope="module")
def shared_path() -> Iterator[Path]:
    """As quick_path, for all tests of a file."""
    with _folder() as path:
        yield path
