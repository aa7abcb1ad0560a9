"""Symbolic links and tags that lead elsewhere: nothing outside the folder of checkpoints is read or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.jobs import run_job
from faults.states import engine_digest, make_engine, run_on
from zerolith.checkpoint.manifest import TRAILER_BYTES, checksum
from zerolith.errors import CheckpointError

WORLD, STAGE = 2, 3
TAGS = [
    "",
    ".",
    "..",
    "../outside",
    "a/b",
    "/tmp/x",
    "a\\b",
    "a\0b",
    ".hidden",
    "latest",
    "latest.new",
    "manifest.json",
]
TAGS += ["a\nb", "x" * 201, "a\x1b[2Jb", "\udcff"]


def listing(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, and where links lead."""
    found = {}
    for path in folder.rglob("*"):
        content = (
            f"-> {path.readlink()}".encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"/"
        )
        found[str(path.relative_to(folder))] = content
    return found


def move_out(path: Path, outside: Path) -> None:
    """Leave a link in its place."""
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


def shard(folder: Path, outside: Path) -> None:
    move_out(next((folder / "global_step1").glob("rank-00001-*")), outside)


def tag(folder: Path, outside: Path) -> None:
    move_out(folder / "global_step1", outside)


def manifest(folder: Path, outside: Path) -> None:
    move_out(folder / "global_step1" / "manifest.json", outside)


def latest(folder: Path, outside: Path) -> None:
    move_out(folder / "latest", outside)


def latest_that_leads_out(folder: Path, outside: Path) -> None:
    shutil.copytree(folder / "global_step1", outside / "other")
    (folder / "latest").write_text(f"../outside/other\n{checksum(b'../outside/other')}\n")


def manifest_that_leads_out(folder: Path, outside: Path) -> None:
    path = folder / "global_step1" / "manifest.json"
    told = json.loads(path.read_bytes()[:-TRAILER_BYTES] + b"}")
    name = told["files"][0]["name"]
    shutil.move(path.with_name(name), outside / name)
    told["files"][0]["name"] = f"../../outside/{name}"
    body = json.dumps(told, separators=(",", ":")).encode()[:-1]
    path.write_bytes(body + b',\n"xxh3": "' + checksum(body).encode() + b'"}\n')


ON_LOAD: dict[str, tuple[Callable[[Path, Path], None], str]] = {  # what is done, and what the error names
    "shard": (shard, r"/global_step1/rank-00001-[0-9a-f]{16}\.safetensors: it cannot be opened"),
    "tag": (tag, r"/global_step1: it is a symbolic link"),
    "manifest": (manifest, r"/global_step1/manifest\.json: it cannot be read"),
    "latest": (latest, r"/latest: it cannot be read"),
    "latest that leads out": (latest_that_leads_out, r"tag '\.\./outside/other'"),
    "manifest that leads out": (manifest_that_leads_out, r"/global_step1/manifest\.json: files\.0\.name"),
}


@pytest.mark.parametrize("name", ON_LOAD)
def test_loading_follows_no_link_and_changes_nothing(name: str, quick_path: Path) -> None:
    spoil, words = ON_LOAD[name]
    folder, outside = quick_path / "inside", quick_path / "outside"
    outside.mkdir()

    def body() -> None:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(folder)
        if engine.global_rank == 0:
            spoil(folder, outside)
        run_on(engine, to=2)
        before = engine_digest(engine)
        with pytest.raises(CheckpointError, match=words):
            engine.load_checkpoint(folder)
        assert engine_digest(engine) == before
        run_on(engine, to=3)

    assert [ended.text for ended in run_job(WORLD, body)] == [""] * WORLD


def plant_lock(folder: Path, outside: Path) -> None:
    (folder / ".zerolith.lock").unlink()
    (folder / ".zerolith.lock").symlink_to(outside / "precious")


def plant_tag(folder: Path, outside: Path) -> None:
    (folder / "global_step2").symlink_to(outside)


def plant_temporary_names(folder: Path, outside: Path) -> None:
    (folder / "latest.new").symlink_to(outside / "precious")
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "manifest.json.new").symlink_to(outside / "precious")


def plant_final_names(folder: Path, outside: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(outside / "precious")
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "manifest.json").symlink_to(outside / "precious")


def plant_new_names(folder: Path, outside: Path) -> None:
    (folder / "latest.new").symlink_to(outside / "new")
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "manifest.json").symlink_to(outside / "new")


def plant_old_tags(folder: Path, outside: Path) -> None:
    """Retention and sweeping see a tag of ours that lies elsewhere."""
    shutil.copytree(folder / "global_step1", outside / "elsewhere")
    (folder / "global_step0").symlink_to(outside / "elsewhere")


ON_SAVE: dict[str, tuple[Callable[[Path, Path], None], str]] = {  # what is done, and the error; empty if it works
    "lock": (plant_lock, r"/\.zerolith\.lock: Too many levels of symbolic links"),
    "tag": (plant_tag, r"/global_step2: it is a symbolic link"),
    "temporary names": (plant_temporary_names, ""),
    "final names": (plant_final_names, ""),
    "new names": (plant_new_names, ""),
    "old tags": (plant_old_tags, ""),
}


@pytest.mark.parametrize("name", ON_SAVE)
def test_saving_follows_no_link(name: str, quick_path: Path) -> None:
    plant, words = ON_SAVE[name]
    folder, outside = quick_path / "inside", quick_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")

    def first() -> None:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(folder)

    def second() -> None:
        engine = make_engine(STAGE, checkpoint={"keep_last": 1})
        run_on(engine, to=2)
        before = engine_digest(engine)
        if words:
            with pytest.raises(CheckpointError, match=words):
                engine.save_checkpoint(folder)
        else:
            engine.save_checkpoint(folder)
            run_on(engine, to=3)
            engine.load_checkpoint(folder)
        assert engine_digest(engine) == before

    assert [ended.text for ended in run_job(WORLD, first)] == [""] * WORLD
    plant(folder, outside)
    before = listing(outside)
    assert [ended.text for ended in run_job(WORLD, second)] == [""] * WORLD
    assert listing(outside) == before


def test_a_tag_is_a_plain_name(quick_path: Path) -> None:
    folder = quick_path / "inside"

    def body() -> None:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(folder)
        before = listing(quick_path)
        for name in TAGS:
            for call in (engine.save_checkpoint, engine.load_checkpoint):
                with pytest.raises(CheckpointError, match=r"tag '"):
                    call(folder, tag=name)
        assert listing(quick_path) == before
        run_on(engine, to=2)

    assert [ended.text for ended in run_job(WORLD, body)] == [""] * WORLD
