"""All that a save does to files goes through Disk: what these tests count, fail and record is all there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.disks import FaultyDisk, Op
from faults.jobs import run_job
from faults.states import make_engine, run_on
from plain import STAGES

WORLD = 2
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
KINDS = {"os.remove": "unlink", "os.mkdir": "make_dir", "os.rmdir": "remove_dir"}
ELSE = {"os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move"}


class Watch:
    """What Python itself tells of changes to files below a folder, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.seen: list[tuple[str, ...]] = []
        sys.addaudithook(self)  # for the rest of this process's life

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._note("create", args[0])
        elif event == "os.rename":
            self._note("rename", *args[:2])
        elif event in KINDS:
            self._note(KINDS[event], args[0])
        elif event in ELSE:
            path = f"/proc/self/fd/{args[0]}"
            self._note(event, os.readlink(path) if isinstance(args[0], int) else args[0])

    def _note(self, kind: str, *paths: Any) -> None:
        names = tuple(os.fspath(path) for path in paths if isinstance(path, str | os.PathLike))
        if names and names[0].startswith(self.folder):
            self.seen.append((kind, *names))


def noted(ops: list[Op]) -> Iterator[tuple[str, ...]]:
    for op in ops:
        if op.kind not in ("write", "sync", "sync_dir"):
            yield (op.kind, str(op.path), *([str(op.target)] if op.target is not None else []))


def check_noted(watch: Watch, disk: FaultyDisk) -> None:
    """Everything that was seen had been asked of the disk, in the same order."""
    asked = [*noted(disk.begun)]
    bypassed = [each for each in watch.seen if each not in asked]
    assert not bypassed
    assert watch.seen == asked
    check_contents(disk.trace)


@pytest.mark.parametrize("behind", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_written_through_the_disk_alone(stage: int, behind: bool, quick_path: Path) -> None:
    folder = quick_path / "runs" / "checkpoints"

    def body() -> int:
        settings = {"async_save": behind, "keep_last": 1, "verify_after_save": True}
        engine = make_engine(stage, checkpoint=settings)
        engine._disk, watch = FaultyDisk(), Watch(quick_path)
        for step in (1, 2, 3):
            run_on(engine, to=step)
            engine.save_checkpoint(folder)
            engine._saver.flush()
        engine.save_checkpoint(folder)  # the same tag again
        engine._saver.flush()
        lock = str(folder / ".zerolith.lock")  # says who holds it, and nothing that lasts
        around_lock = [each for each in watch.seen if each[1] == lock]
        assert around_lock == ([("create", lock), ("os.truncate", lock)] if engine.global_rank == 0 else [])
        watch.seen = [each for each in watch.seen if each[1] != lock]
        check_noted(watch, engine._disk)
        return len(watch.seen)

    first, second = run_job(WORLD, body)
    assert first.status == second.status == 0, (first, second)
    assert first.result > 40
    assert second.result == 4


def test_weights_are_written_through_the_disk_alone(quick_path: Path) -> None:
    def body() -> None:
        engine = make_engine(3)
        engine._disk, watch = FaultyDisk(), Watch(quick_path)
        engine.save_16bit_model(quick_path / "new" / "folder")
        if engine.global_rank == 0:
            check_noted(watch, engine._disk)

    assert [ended.text for ended in run_job(WORLD, body)] == [""] * WORLD


def check_contents(trace: list[Op]) -> None:
    """What files hold is what was written through the disk."""
    written: dict[Path, bytes] = {}
    for op in trace:
        if op.kind == "create":
            written[op.path] = b""
        elif op.kind == "write":
            written[op.path] += op.data
        elif op.kind == "rename":
            assert op.target is not None
            written[op.target] = written.pop(op.path)
        elif op.kind == "unlink":
            written.pop(op.path, None)
    assert written
    for path, data in written.items():
        assert not path.exists() or path.read_bytes() == data
