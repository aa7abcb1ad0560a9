"""Checkpoints that several files of tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness import run_ranks
from saved_runs import BF16, Truth, make_odd, train_and_save


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A job's folder with one checkpoint of stage 3 in bf16 on two ranks. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, train_and_save, folder, 3, BF16)[0]


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """The same of a model with everything that a state dict may hold, at stage 2."""
    folder = tmp_path_factory.mktemp("odd")
    return folder, run_ranks(2, train_and_save, folder, 2, BF16, make_odd)[0]


@pytest.fixture
def copied(saved: tuple[Path, Truth], tmp_path: Path) -> Path:
    """The same folder, to be changed."""
    return Path(shutil.copytree(saved[0], tmp_path / "copied"))
