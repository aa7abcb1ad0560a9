"""`zerolith checkpoint verify` finds every wrong byte, and goes on after each."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from saved_runs import data_file, flip
from zerolith.checkpoint import Reader
from zerolith.checkpoint.manifest import read_manifest

Run = Callable[..., tuple[int, str, str]]


def test_whole_checkpoints_are_whole(saved: Path, run: Run) -> None:
    assert run("verify", saved)[:2] == (0, run("verify", saved, "--tag", "global_step3")[1])
    status, out, err = run("verify", saved, "--all")
    assert (status, err) == (0, "")
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "global_step1: whole",
        "global_step2: whole",
        "global_step3: whole",
        "3 of 3 checkpoints whole",
    ]


def test_a_checkpoint_may_be_where_one_stands(saved: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved / "global_step1")
    assert run("verify", ".")[1].startswith("global_step1: whole")


def test_every_damaged_tensor_is_listed(copied: Path, run: Run) -> None:
    home = copied / "global_step3"
    expected = set()
    for tensor in ("value/norm.bias", "optimizer/exp_avg/embed.weight", "rank/1/rng/torch"):
        name, start = flip(home, tensor)
        expected.add((name, str(start), tensor))
    status, out, _ = run("verify", copied)
    assert status == 2
    assert out.splitlines()[0] == "global_step3: damaged in 3 places"
    pattern = r"  (\S+): bytes (\d+) to \d+ of tensor '(.*)': their checksum is wrong"
    assert {match.groups() for line in out.splitlines()[1:] if (match := re.fullmatch(pattern, line))} == expected


@pytest.mark.parametrize("what", ["missing", "cut", "longer", "header", "swapped", "pipe", "link", "folder"])
def test_a_file_that_is_wrong_does_not_hide_what_is_wrong_in_others(copied: Path, run: Run, what: str) -> None:
    home = copied / "global_step3"
    path, other = data_file(home, 0), data_file(home, 1)
    with Reader(home) as reader:
        tensor = next(name for name, record in reader.manifest.tensors.items() if record.pieces[0].file == 1)
    flip(home, tensor)
    data = path.read_bytes()
    path.unlink()
    if what in ("cut", "longer", "header", "swapped"):
        spoiled = {"cut": data[:-8], "longer": data + b"x", "header": data[:9] + b"x" + data[10:]}
        path.write_bytes(spoiled.get(what) or data_file(copied / "global_step2", 0).read_bytes())
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(other)
    elif what == "folder":
        path.mkdir()
    status, out, _ = run("verify", copied)
    assert status == 2
    words = {
        "missing": "this file of the checkpoint is missing; it held",
        "cut": f"it has {len(data) - 8} bytes, and {len(data)} were written",
        "longer": f"it has {len(data) + 1} bytes, and {len(data)} were written",
        "header": "its header is not what was written",
        "swapped": "it belongs to another checkpoint",
        "pipe": "it is not a regular file",
        "link": "it cannot be opened (Too many levels of symbolic links); links are not followed",
        "folder": "it is not a regular file",
    }
    assert f"{path.name}: {words[what]}" in out
    assert re.search(rf"{other.name}: bytes \d+ to \d+ of tensor '{re.escape(tensor)}'", out)
    if what == "cut":
        assert re.search(rf"{path.name}: bytes \d+ to {len(data)} of tensor .*: the file ends before or in them", out)
    if what in ("longer", "header"):
        assert out.count(path.name) == 1, "its tensors are whole"


def test_every_single_byte_counts(copied: Path, run: Run) -> None:
    """Flip a byte at a time, in the header, between and in tensors, and in the manifest."""
    home = copied / "global_step3"
    for path in (data_file(home, 0), home / "manifest.json"):
        data = path.read_bytes()
        for at in {*range(0, len(data), len(data) // 40), len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert run("verify", copied, "--tag", "global_step3")[0] == 2, at
        path.write_bytes(data)
    assert run("verify", copied)[0] == 0


def test_neighbouring_chunks_are_one_place(tmp_path: Path, run: Run) -> None:
    def save() -> None:
        import zerolith

        model = torch.nn.Linear(1024, 1536, bias=False)  # six chunks
        zerolith.initialize(model=model, config={"train_batch_size": 1})[0].save_checkpoint(tmp_path)

    run_ranks(1, save)
    home = tmp_path / "global_step0"
    path = data_file(home, 0)
    offset = read_manifest(home).tensors["value/weight"].pieces[0].offset
    data = bytearray(path.read_bytes())
    for chunk in (1, 2, 4):
        data[offset + chunk * 2**20 + 17] ^= 1
    path.write_bytes(data)
    lines = run("verify", tmp_path)[1].splitlines()[1:]
    ends = [
        tuple((int(number) - offset) // 2**20 for number in re.findall(r"bytes (\d+) to (\d+)", line)[0])
        for line in lines
    ]
    assert ends == [(1, 3), (4, 5)]


def test_all_goes_on_after_damage_and_looks_at_latest(copied: Path, run: Run) -> None:
    flip(copied / "global_step1", "value/norm.bias")
    (copied / "global_step2" / "manifest.json").write_text("{}")
    unfinished = copied / "global_step9"
    unfinished.mkdir()
    (unfinished / "rank-00000-0123456789abcdef.safetensors").write_text("x")
    status, out, _ = run("verify", copied, "--all")
    assert status == 2
    assert "global_step1: damaged in 1 place\n" in out
    assert "manifest.json: it does not end with its checksum" in out
    assert "global_step3: whole" in out
    assert "global_step9: unfinished, 1 B" in out
    assert out.endswith("1 of 3 checkpoints whole\n")
    shutil.rmtree(copied / "global_step1")
    shutil.rmtree(copied / "global_step2")
    (copied / "latest").write_text("global_step3\n")
    status, out, _ = run("verify", copied, "--all")
    assert status == 2
    assert out.endswith("latest: it is not what was written; name a tag when you load\n")


def test_an_unreadable_disk_is_damage(copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("zerolith.checkpoint.verify.read_into", failing)
    status, out, _ = run("verify", copied)
    assert status == 2
    assert "the disk does not give them (Input/output error)" in out
