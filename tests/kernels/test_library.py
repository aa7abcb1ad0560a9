"""The library of an installation: found, refused or missing."""

from __future__ import annotations

import ctypes.util
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cases import LIBRARIES
from zerolith import kernels
from zerolith.errors import UsageError
from zerolith.kernels import native


@pytest.fixture
def other_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An installation whose library is looked for anew; afterwards all is as before."""
    native.library.cache_clear()
    load = native.load
    monkeypatch.setattr(native, "load", lambda: load(native.PATH))
    yield monkeypatch
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no compiler")
def test_an_installation_from_source_has_the_library() -> None:
    assert kernels.is_compiled()
    assert "generic" in LIBRARIES


def test_without_the_library_torch_does_the_same_and_says_so_once(
    other_path: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    grad = torch.randn(1000).bfloat16()
    if native.PATH.exists():
        expected = kernels.square_sums(grad)
    native.library.cache_clear()
    present = native.PATH.exists()
    other_path.setattr(native, "PATH", tmp_path / "libzerolith_kernels.so")
    with caplog.at_level(logging.WARNING, logger="zerolith"):
        assert not kernels.is_compiled()
        for _ in range(3):
            squares = kernels.square_sums(grad)
            kernels.sgd(torch.zeros(3), None, torch.ones(3), lr=0.1, step=1)
    if present:
        assert torch.equal(squares, expected)
    assert len(caplog.records) == 1
    assert "no compiled library" in caplog.text
    assert "C++ compiler" in caplog.text


@pytest.mark.skipif(not ctypes.util.find_library("m"), reason="needs any other library")
def test_another_library_is_refused(other_path: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    other_path.setattr(native, "PATH", ctypes.util.find_library("m"))
    assert not kernels.is_compiled()
    assert "another version's" in caplog.text


@pytest.mark.skipif(not LIBRARIES, reason="nothing was compiled")
def test_the_library_of_another_version_is_refused(
    other_path: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other_path.setattr(native, "ABI", native.ABI + 1)
    assert not kernels.is_compiled()
    assert "another version's" in caplog.text


@pytest.mark.skipif(not LIBRARIES, reason="nothing was compiled")
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'sse9': this processor and library have .*generic"):
        native.load(instruction_set="sse9")


@pytest.mark.skipif(not LIBRARIES, reason="nothing was compiled")
def test_the_best_instruction_set_is_taken() -> None:
    assert native.load().instruction_set == list(LIBRARIES)[-1]
