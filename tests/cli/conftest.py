"""What the tests of commands on checkpoints share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import run_ranks
from models import make_gpt, my_pieces, start_engine, token_batches, zero_config
from zerolith.cli import main

Run = Callable[..., tuple[int, str, str]]


def save_three(folder: Path) -> None:
    engine = start_engine(make_gpt(layers=1), zero_config(3, bf16={"enabled": True}))
    for batch in token_batches(3, 4 * engine.world_size):
        for piece in my_pieces(batch, engine):
            engine.backward(engine(piece))
            engine.step()
        engine.save_checkpoint(folder, client_state={"epoch": 1})


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 3 of a run on two ranks. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_three, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "job"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command `zerolith checkpoint` in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        """(status, output, errors)"""
        status = main(["checkpoint", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call
