"""`zerolith checkpoint` shows, exports and removes; every mistake is one line and status 2."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import make_gpt
from saved_runs import data_file
from zerolith.checkpoint import get_fp32_state_dict
from zerolith.checkpoint.folder import Lock
from zerolith.checkpoint.manifest import read_manifest
from zerolith.cli import main
from zerolith.cli.words import size, size_text

Run = Callable[..., tuple[int, str, str]]


def as_table(text: str) -> list[list[str]]:
    """Cells of the indented lines."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith("  ")]


# --- info ---------------------------------------------------------------------------------------------


def test_info_lists_the_checkpoints_of_a_folder(saved: Path, run: Run) -> None:
    status, out, err = run("info", saved)
    assert (status, err) == (0, "")
    assert out.startswith(f"{saved}: 3 checkpoints, ")
    head, *rows = as_table(out)
    assert head == ["step", "tag", "saved", "ranks", "size", "state"]
    assert [(row[0], row[1], row[3], row[5]) for row in rows] == [
        ("1", "global_step1", "2", "whole"),
        ("2", "global_step2", "2", "whole"),
        ("3", "global_step3", "2", "whole, latest"),
    ]


def test_info_says_what_is_wrong_without_reading_all(copied: Path, run: Run) -> None:
    os.truncate(data_file(copied / "global_step1", 0), 5000)
    data_file(copied / "global_step2", 1).unlink()
    (copied / "global_step3" / "manifest.json").unlink()
    shutil.copytree(copied / "global_step2", copied / "best")
    (copied / "best" / "manifest.json").write_text("{}")
    (copied / "bad\x1b[31m").mkdir()
    (copied / "bad\x1b[31m" / "manifest.json").write_text("{}")
    (copied / "tensorboard").mkdir()
    (copied / "link").symlink_to("global_step2")
    status, out, _ = run("info", copied)
    assert status == 0
    assert "\x1b" not in out
    states = {row[1]: row[-1] for row in as_table(out)[1:]}
    assert states.keys() == {"bad\\x1b[31m", "best", "global_step1", "global_step2", "global_step3"}
    assert "damaged: manifest.json: it does not end with its checksum" in states["best"]
    assert re.search(r"damaged: rank-00000-\w+.safetensors: it has 5000 bytes, and \d+ were", states["global_step1"])
    assert re.search(r"damaged: rank-00001-\w+.safetensors: this file .* is missing", states["global_step2"])
    assert states["global_step3"] == "unfinished: it has no manifest"
    assert states["bad\\x1b[31m"].startswith("unreadable")
    assert f"{copied}/latest names 'global_step3', which is no checkpoint" in out


@pytest.mark.parametrize("by", ["tag", "folder"])
def test_info_says_what_is_in_a_checkpoint(saved: Path, run: Run, by: str) -> None:
    _, out, _ = run("info", saved / "global_step2") if by == "folder" else run("info", saved, "--tag", "global_step2")
    facts = {row[0]: row[1:] for row in as_table(out.partition("kind")[0])}
    numel = sum(param.numel() for param in make_gpt(layers=1).parameters())
    count = len(list(make_gpt(layers=1).parameters()))
    assert facts["model"] == [f"{numel:,} elements in {count} parameters, computed in BF16"]
    assert facts["tied"] == ["embed.weight = head.weight"]
    assert facts["optimizer"] == ["torch.optim.adamw.AdamW, 1 param group"]
    assert facts["samples"] == ["16, 8 a step"]
    assert facts["as well"] == ["client state (epoch)"]
    assert re.search(r"weights +\d+ +[\d.]+ kB  F32", out)
    assert re.search(r"optimizer +\d+ +[\d.]+ kB  F32 +exp_avg, exp_avg_sq", out)
    assert f"torch {torch.__version__}" in out


def test_info_is_json_for_programs(saved: Path, run: Run) -> None:
    listed = json.loads(run("info", saved, "--json")[1])
    assert [each["tag"] for each in listed["checkpoints"]] == ["global_step1", "global_step2", "global_step3"]
    assert listed["latest"] == "global_step3"
    one = json.loads(run("info", saved, "--tag", "global_step1", "--json")[1])
    sizes = [kind["bytes"] for kind in one["kinds"].values()]
    assert sum(sizes) == one["bytes"] == sum(file.bytes for file in read_manifest(saved / "global_step1").files)
    assert one["optimizer"] == {"class": "torch.optim.adamw.AdamW", "groups": 1}


def test_info_of_an_empty_folder(tmp_path: Path, run: Run) -> None:
    assert run("info", tmp_path) == (0, f"{tmp_path}: no checkpoints\n", "")


# --- export -------------------------------------------------------------------------------------------


def test_export_writes_what_it_says(saved: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("export", saved, tmp_path / "hf", "--tag", "global_step2", "--dtype", "fp32")
    assert (status, err) == (0, "")
    assert re.fullmatch(rf" *[\d.]+ kB  {tmp_path}/hf/model.safetensors\n", out)
    expected = get_fp32_state_dict(saved, "global_step2")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])
    status, out, _ = run("export", saved, tmp_path / "hf", "--max-shard-size", "20kB", "--overwrite")
    assert status == 0
    assert len(out.splitlines()) > 2
    assert out.splitlines()[-1].endswith("model.safetensors.index.json")
    first = load_file(tmp_path / "hf" / "model-00001-of-00002.safetensors")
    assert first["embed.weight"].dtype == torch.bfloat16


def test_wrong_calls_are_one_line_and_status_2(saved: Path, tmp_path: Path, run: Run) -> None:
    run("export", saved, tmp_path / "full")
    for words, *arguments in [
        ("there is no such folder", "info", tmp_path / "nowhere"),
        ("there is no such folder", "verify", tmp_path / "nowhere", "--all"),
        ("there is no checkpoint here", "verify", tmp_path),
        ("there is no checkpoint here", "verify", tmp_path, "--all"),
        ("there is global_step1, global_step2, global_step3", "info", saved, "--tag", "nope"),
        ("a tag names a folder", "export", saved, tmp_path / "hf", "--tag", "../saved"),
        ("it is not empty; choose another folder", "export", saved, tmp_path / "full"),
        ("there is no such folder", "prune", tmp_path / "nowhere", "--keep-last", "1"),
        ("there is no checkpoint of DeepSpeed", "import", saved / "global_step1", tmp_path / "new"),
    ]:
        status, out, err = run(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), arguments
        assert words in err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify"],
        ["verify", "x", "--all", "--tag", "y"],
        ["export", "x", "y", "--dtype", "int8"],
        ["export", "x", "y", "--max-shard-size", "5 parsecs"],
        ["export", "x", "y", "--max-shard-size", "0"],
        ["prune", "x"],
        ["prune", "x", "--keep-last", "0"],
        ["prune", "x", "--keep-last", "-1"],
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", *arguments])
    assert left.value.code == 2
    assert "usage: zerolith checkpoint" in capsys.readouterr().err


# --- prune --------------------------------------------------------------------------------------------


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_prune_removes_old_ones_and_left_overs(copied: Path, run: Run) -> None:
    left = copied / "global_step2" / "rank-00007-0123456789abcdef.safetensors"
    left.write_bytes(b"12345")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    status, out, _ = run("prune", copied, "--keep-last", 1, "--dry-run")
    assert status == 0
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert out.splitlines()[-1].endswith("would be freed")
    size = sum(path.stat().st_size for path in before if path.parent.name in ("global_step1", "global_step2"))
    status, out, _ = run("prune", copied, "--keep-last", 1)
    assert status == 0
    assert [line.split("  ")[-1] for line in out.splitlines()[:-1]] == [
        "global_step1",
        "global_step2",
        f"global_step2/{left.name} (of an unfinished save)",
    ]
    assert out.splitlines()[-1].startswith(f"{size / 1000:.0f} kB were freed")
    assert tags(copied) == ["global_step3"]
    assert run("verify", copied, "--all")[0] == 0
    assert run("prune", copied, "--keep-last", 1)[1] == "0 B were freed\n"


def test_prune_keeps_every_so_many_and_chosen_tags(copied: Path, run: Run) -> None:
    shutil.copytree(copied / "global_step1", copied / "best")
    run("prune", copied, "--keep-last", 1, "--keep-every", 2)
    assert tags(copied) == ["best", "global_step2", "global_step3"]


def test_prune_counts_whole_ones_only_and_removes_no_damaged_one(copied: Path, run: Run) -> None:
    os.truncate(data_file(copied / "global_step3", 0), 100)
    status, out, _ = run("prune", copied, "--keep-last", 1)
    assert status == 0
    assert tags(copied) == ["global_step2", "global_step3"]
    assert re.search(r"stays  global_step3: rank-00000-\w+.safetensors: it has 100 bytes", out)


def test_prune_leaves_a_folder_alone_in_which_a_job_saves(copied: Path, run: Run) -> None:
    lock = Lock(copied)
    status, out, err = run("prune", copied, "--keep-last", 1)
    assert (status, out) == (2, "")
    assert re.search(rf"another job writes checkpoints here \(process {os.getpid()} on ", err)
    assert len(tags(copied)) == 3
    lock.release()
    assert run("prune", copied, "--keep-last", 1)[0] == 0


def test_prune_asks_for_a_marker_that_can_be_read(copied: Path, run: Run) -> None:
    (copied / "latest").write_text("junk")
    assert run("prune", copied, "--keep-last", 1)[0] == 2
    assert len(tags(copied)) == 3


# --- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5gib", 5 * 2**30), ("200M", 200 * 10**6), ("1.5 kB", 1500), ("4096", 4096), ("7 B", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9999, "10.0 kB"), (99_999, "100 kB"), (999_499, "999 kB"),
     (999_500, "1.00 MB"), (5 * 10**9, "5.00 GB")],
)  # fmt: skip
def test_sizes_are_written_with_three_digits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


# --- on the way ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Or what stderr thinks is one."""

    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for arguments, name in [(["verify", saved], "global_step3"), (["export", saved, tmp_path / "hf"], "exporting")]:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            status, out, _ = run(*arguments)
        assert status == 0
        assert f"{name}: " in terminal.getvalue()
        assert terminal.getvalue().endswith("\r"), "it is wiped out when it is done"
        assert name not in out or name == "global_step3"
    assert run("verify", saved)[2] == ""


def test_the_command_line_is_parsed_without_torch() -> None:
    program = "import sys; from zerolith.cli import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
