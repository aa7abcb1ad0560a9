"""`zerolith schedule plot` draws what a run would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zerolith.cli import main

ADAM = {"type": "Adam", "params": {"lr": 0.5}}
WARMUP = {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_max_lr": 0.5, "warmup_num_steps": 20}}
CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 10}}


def write(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_lr_is_drawn_as_text_and_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, optimizer=ADAM, scheduler=WARMUP)
    assert main(["schedule", "plot", str(path)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert (rows[0][0], float(rows[0][1])) == ("0", 0.0)
    assert (rows[4][0], rows[-1][0]) == ("21", "99")
    assert float(rows[4][1]) == pytest.approx(0.5)
    assert len(rows[4][2]) == 50
    assert "momentum" not in text, "it does not change"
    assert (tmp_path / "config.png").read_bytes().startswith(b"\x89PNG")


def test_momentum_is_drawn_where_it_moves_and_the_file_may_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, optimizer=ADAM, scheduler=CYCLE)
    assert main(["schedule", "plot", str(path), "--steps", "21", "--png", str(tmp_path / "other.png")]) == 0
    text = capsys.readouterr().out
    assert "momentum" in text
    assert (tmp_path / "other.png").exists()
    assert not (tmp_path / "config.png").exists()


def test_without_an_optimizer_a_rate_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, scheduler={"type": "StepLR", "params": {"step_size": 2, "gamma": 0.1}})
    assert main(["schedule", "plot", str(path), "--lr", "2", "--steps", "4"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:5]]
    assert rows == [["0", "2"], ["1", "2"], ["2", "0.2"], ["3", "0.2"]]


def test_a_span_may_be_a_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"total_num_steps": 1e2, "warmup_num_steps": 10}
    path = write(tmp_path, scheduler={"type": "WarmupDecayLR", "params": params})
    assert main(["schedule", "plot", str(path)]) == 0
    assert "99" in capsys.readouterr().out.split()


ONE_CYCLE = {"type": "OneCycleLR", "params": {"max_lr": 1.0, "total_steps": 5}}


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"optimizer": ADAM}, [], "names no schedule"),
        ({"scheduler": {"type": "WarmupLr", "params": {}}}, [], "did you mean 'WarmupLR'"),
        ({"scheduler": {"type": "ReduceLROnPlateau", "params": {}}}, [], "follows the loss"),
        ({"scheduler": WARMUP}, ["--steps", "0"], "at least one"),
        ({"scheduler": WARMUP}, ["--png", "/nowhere/x.png"], "/nowhere/x.png: cannot be written"),
        ({"scheduler": WARMUP}, ["--png", "/tmp/x.foo"], "/tmp/x.foo: cannot be written"),
        ({"scheduler": ONE_CYCLE}, ["--steps", "9"], "OneCycleLR cannot be drawn beyond step 6"),
        ({"scheduler": WARMUP, "optimizer": {"type": "LBFGS", "params": {}}}, [], "cannot be drawn beyond step 1"),
    ],
)
def test_what_cannot_be_drawn_is_said_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], options: list[str], words: str
) -> None:
    assert main(["schedule", "plot", str(write(tmp_path, **config)), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_matplotlib_is_asked_for_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["schedule", "plot", str(write(tmp_path, scheduler=WARMUP))]) == 2
    captured = capsys.readouterr()
    assert "pip install 'zerolith[plot]'" in captured.err
    assert "lr" in captured.out, "the text needs nothing"
