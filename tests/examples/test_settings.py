"""Arguments and configs: what is overridden, what is refused, and in how many lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt.launch import torchrun_command
from gpt.settings import (
    DEFAULT_CONFIG,
    ArgumentsError,
    Settings,
    override,
    precision_of,
    read_settings,
    stage_of,
)

CONFIGS = sorted(DEFAULT_CONFIG.parent.glob("*.json"))


def settings(*arguments: str, **environment: str) -> Settings:
    return read_settings(arguments, environment=environment)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configs_name_says_its_stage_and_precision(path: Path) -> None:
    config = json.loads(path.read_text())
    assert f"zero{stage_of(config)}_{precision_of(config)}" == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_zerolith_accepts_every_config(path: Path) -> None:
    config = pytest.importorskip("zerolith.config")
    config.resolve_batch(config.load_config(json.loads(path.read_text())), 2)


def test_overrides_replace_the_configs_stage_and_precision() -> None:
    run = settings("--stage", "1", "--precision", "fp16")
    assert (run.stage, run.precision) == (1, "fp16")
    assert run.config["zero_optimization"]["stage"] == 1
    assert run.config["fp16"]["enabled"] is True
    assert "bf16" not in run.config


def test_an_override_keeps_the_rest_of_its_section_and_the_original() -> None:
    config = {"fp16": {"enabled": False, "loss_scale": 8}, "zero_optimization": {"overlap_comm": True}}
    original = json.loads(json.dumps(config))
    changed = override(config, stage=2, precision="fp16")
    assert changed["fp16"] == {"enabled": True, "loss_scale": 8}
    assert changed["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert config == original
    assert override(config, stage=None, precision=None) == original


def test_ranks_come_from_torchrun_and_must_agree() -> None:
    assert settings(WORLD_SIZE="4").ranks == 4
    assert not settings("--ranks", "4", WORLD_SIZE="4").start_ranks
    with pytest.raises(ArgumentsError, match="disagrees with the 4 ranks"):
        settings("--ranks", "2", WORLD_SIZE="4")


def test_without_torchrun_several_ranks_are_started_and_one_is_not() -> None:
    assert settings("--ranks", "2").start_ranks
    assert not settings("--ranks", "1").start_ranks
    assert not settings().start_ranks
    command = torchrun_command(Path("script.py"), ["--steps", "3"], ranks=2)
    assert command[-4:] == ["--nproc-per-node=2", "script.py", "--steps", "3"]


def test_a_runs_folder_is_named_after_what_is_run() -> None:
    assert settings("--stage", "0", "--precision", "fp32").folder == Path("runs/zero0_fp32_1ranks")
    assert settings("--out", "there", "--name", "mine").folder == Path("there/mine")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stage", "4"],
        ["--precision", "fp8"],
        ["--steps", "0"],
        ["--steps", "many"],
        ["--ranks", "-1"],
        ["--max-minutes", "nan"],
        ["--max-minutes", "0"],
        ["--width", "100"],
        ["--seed", "-1"],
        ["--name", "a/b"],
        ["--config", "no/such/file.json"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_refused_in_one_line_that_names_them(arguments: list[str]) -> None:
    with pytest.raises(ArgumentsError) as caught:
        settings(*arguments)
    assert arguments[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ArgumentsError, match="JSON"):
        settings("--config", str(path))
