"""Triton's kernels are used where they run, and torch's operations where they do not."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zerolith import kernels
from zerolith.kernels.backend import triton_on

CPU = torch.device("cpu")  # stands for a GPU: the kernels are made up


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    triton_on.cache_clear()
    yield
    triton_on.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, add: Any) -> SimpleNamespace:
    made_up = SimpleNamespace(add=add)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "zerolith.kernels.triton_kernels", made_up)
    monkeypatch.setattr(kernels, "triton_kernels", made_up, raising=False)
    return made_up


def test_kernels_that_run_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []
    made_up = install(monkeypatch, lambda *args, **kwargs: tries.append(args))
    assert triton_on(CPU) is triton_on(CPU) is made_up
    assert len(tries) == 1


def test_without_a_compiler_torch_does_the_work_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def add(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    install(monkeypatch, add)
    with caplog.at_level(logging.WARNING, logger="zerolith"):
        assert triton_on(CPU) is None
        assert triton_on(CPU) is None
    assert caplog.text.count("Failed to find C compiler") == 1


def test_without_triton_nothing_is_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_on(CPU) is None
    assert not caplog.records
