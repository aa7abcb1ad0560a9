"""A disk that is full, broken or closed to us: an error on all ranks that names the file, and nothing else is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from faults.disks import FailingDisk, FaultyDisk, FullDisk
from faults.jobs import run_job
from faults.scenarios import start_again
from faults.states import checkpoint_digest, engine_digest, left_overs, make_engine, run_on
from zerolith.checkpoint import Disk, find
from zerolith.errors import CheckpointError

WORLD, STAGE = 2, 3
DATA_FILE = re.compile(r"/rank-\d{5}-[0-9a-f]{16}\.safetensors$")


class Failure(NamedTuple):
    """A save that did not work, as a rank saw it."""

    what: str  # that was done to it
    kind: str  # of the error; empty if there was none
    text: str
    newest: str  # the tag that loads now
    digest: str  # of its content
    left: list[str]  # files that belong to nothing
    is_committed: bool  # there is a manifest under the save's tag
    is_unchanged: bool  # the engine's state


def fail_to_save(engine: Any, folder: Path, disk: Disk, what: str, *, tag: str) -> Failure:
    """Save on this disk. Collective; ranks may have different disks."""
    before = engine_digest(engine)
    saver = engine._open_saver()
    healthy, saver.disk = saver.disk, disk
    error: Exception | None = None
    try:
        engine.save_checkpoint(folder, tag=tag)
    except Exception as caught:
        error = caught
    saver.disk = healthy
    is_unchanged = engine_digest(engine) == before
    (newest,) = find(folder, None)
    digest, left = checkpoint_digest(folder / newest), left_overs(folder)
    is_committed = (folder / tag / "manifest.json").exists()
    engine._sharded.comm.max([0.0], name="looked")  # before the next save changes what others look at
    kind = type(error).__name__ if error is not None else ""
    return Failure(what, kind, str(error), newest, digest, left, is_committed, is_unchanged)


def check_failures(outcomes: list[list[Failure]], *, newest: set[str], digests: set[str]) -> None:
    """What holds after every failed save, whatever the fault."""
    assert all(len(rows) == len(outcomes[0]) for rows in outcomes)
    for failures in zip(*outcomes, strict=True):
        for failure in failures:
            assert failure.kind == "CheckpointError", failure
            assert "\n" not in failure.text
            assert failure.newest in newest, failure
            assert failure.digest in digests, failure
            # What a new manifest has replaced stays where it is not sure yet that the manifest does.
            assert failure.is_committed or failure.left == [], failure
            assert all(DATA_FILE.search(name) for name in failure.left), failure
            assert failure.is_unchanged, failure


FILES: dict[str, tuple[int, Callable[[Path], bool], list[int | float]]] = {
    # who writes it, which file it is, and at which byte the disk is full; fractions are of its size
    "shard of rank 0": (0, lambda path: path.suffix == ".safetensors", [0, 1, 7, 8, 9, 500, 4096, 0.5, 0.9, 0.9999]),
    "shard of rank 1": (1, lambda path: path.suffix == ".safetensors", [0, 1, 7, 8, 9, 500, 4096, 0.5, 0.9, 0.9999]),
    "manifest": (0, lambda path: path.name == "manifest.json.new", [0, 1, 0.5, 0.9999]),
    "latest": (0, lambda path: path.name == "latest.new", [0, 1, 0.5, 0.97]),
}
SPOKEN = {
    "shard of rank 0": r"global_step2/rank-00000-[0-9a-f]{16}\.safetensors: No space left on device",
    "shard of rank 1": r"global_step2/rank-00001-[0-9a-f]{16}\.safetensors: No space left on device",
    "manifest": r"global_step2/manifest\.json(\.new)?: No space left on device",
    "latest": r"/latest(\.new)?: No space left on device",
}


def sizes_of(trace: list[Any]) -> dict[Path, int]:
    sizes: dict[Path, int] = {}
    for op in trace:
        if op.kind == "write":
            sizes[op.path] = sizes.get(op.path, 0) + len(op.data)
    return sizes


def test_a_full_disk_fails_the_save_on_all_ranks_and_training_goes_on(quick_path: Path) -> None:
    def body() -> tuple[list[Failure], str, str, str]:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path / "job")
        old = checkpoint_digest(quick_path / "job/global_step1")
        run_on(engine, to=2)
        healthy = FaultyDisk()
        engine._saver.disk = healthy
        engine.save_checkpoint(quick_path / "rehearsal")
        failures = []
        for what, (rank, matches, places) in FILES.items():
            for place in places:
                size = sum(size for path, size in sizes_of(healthy.trace).items() if matches(path))
                room = int(place * size) if isinstance(place, float) else place
                disk = FullDisk(matches, room) if engine.global_rank == rank else Disk()
                failures.append(fail_to_save(engine, quick_path / "job", disk, what, tag="global_step2"))
        run_on(engine, to=3)
        engine.save_checkpoint(quick_path / "job")
        return failures, old, engine_digest(engine), resumed(quick_path / "job")

    ends = run_job(WORLD, body)
    assert [ended.status for ended in ends] == [0, 0], ends
    outcomes, (old, *_), (digest, *_), (again, *_) = zip(*(ended.result for ended in ends), strict=True)
    check_failures(outcomes, newest={"global_step1"}, digests={old})
    assert len(outcomes[0]) == sum(len(places) for _, _, places in FILES.values())
    for failures in zip(*outcomes, strict=True):
        for rank, failure in enumerate(failures):
            assert re.search(SPOKEN[failure.what], failure.text), failure
            victim = FILES[failure.what][0]
            assert rank == victim or f"rank {victim} failed: " in failure.text, failure
    assert digest == again
    start_again(STAGE, quick_path / "job")
    assert left_overs(quick_path / "job") == []


def resumed(folder: Path) -> str:
    """The state that another engine has from the newest checkpoint. Collective."""
    engine = make_engine(STAGE)
    assert engine.load_checkpoint(folder)[0] is not None
    return engine_digest(engine)


@pytest.mark.parametrize("tag", ["global_step2", "same"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_an_error_in_any_operation_fails_the_save_on_all_ranks(tag: str, code: int, quick_path: Path) -> None:
    folder, rehearsal = quick_path / "job", quick_path / "rehearsal"

    def body() -> tuple[list[Failure], set[str], str, str]:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(folder, tag="same")
        engine.save_checkpoint(rehearsal, tag="same")
        run_on(engine, to=2)
        healthy = FaultyDisk()
        engine._saver.disk = healthy
        engine.save_checkpoint(rehearsal, tag=tag)
        engine._saver.disk = FaultyDisk()
        digests = {checkpoint_digest(folder / "same"), checkpoint_digest(rehearsal / tag)}
        # The first may be a sync that a job before this one should have done, which nobody insists on.
        own = [number for number, op in enumerate(healthy.begun) if number or op.kind != "sync_dir"]
        numbers = engine._sharded.comm.all_gather_bytes(json.dumps(own).encode(), name="operations")
        failures = []
        for rank, number in [(rank, number) for rank, row in enumerate(numbers) for number in json.loads(row)]:
            disk = FailingDisk(number, code) if engine.global_rank == rank else Disk()
            failures.append(fail_to_save(engine, folder, disk, f"operation {number} of rank {rank}", tag=tag))
        run_on(engine, to=3)
        engine.save_checkpoint(folder, tag="last")
        return failures, digests, engine_digest(engine), resumed(folder)

    ends = run_job(WORLD, body)
    assert [ended.status for ended in ends] == [0, 0], ends
    outcomes, (digests, *_), (digest, *_), (again, *_) = zip(*(ended.result for ended in ends), strict=True)
    check_failures(outcomes, newest={"same", tag}, digests=digests)
    assert len(outcomes[0]) >= 30
    for failures in zip(*outcomes, strict=True):
        for rank, failure in enumerate(failures):
            victim = int(failure.what[-1])
            assert str(folder) in failure.text, failure
            assert os.strerror(code) in failure.text, failure
            assert rank == victim or f"rank {victim} failed: " in failure.text, failure
    assert digest == again
    start_again(STAGE, folder)
    assert left_overs(folder) == []


@pytest.mark.parametrize("rank", range(WORLD))
def test_the_system_s_own_limit_of_file_sizes_fails_the_save_on_all_ranks(rank: int, quick_path: Path) -> None:
    def body() -> tuple[list[Failure], str, str, str]:
        engine = make_engine(STAGE)
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path)
        old = checkpoint_digest(quick_path / "global_step1")
        run_on(engine, to=2)
        failures = []
        for size in (0, 100, 5000, 10_000):  # bytes; the smallest shard has more
            if engine.global_rank == rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            failures.append(fail_to_save(engine, quick_path, Disk(), f"{size} bytes", tag="global_step2"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        engine.save_checkpoint(quick_path)
        return failures, old, engine_digest(engine), resumed(quick_path)

    ends = run_job(WORLD, body)
    assert [ended.status for ended in ends] == [0, 0], ends
    outcomes, (old, *_), (digest, *_), (again, *_) = zip(*(ended.result for ended in ends), strict=True)
    check_failures(outcomes, newest={"global_step1"}, digests={old})
    for failure in (failure for failures in outcomes for failure in failures):
        assert re.search(rf"/global_step2/rank-0000{rank}-[0-9a-f]{{16}}\.safetensors: File too large", failure.text)
    assert digest == again


def test_a_full_disk_leaves_the_old_file_of_weights(quick_path: Path) -> None:
    path = quick_path / "model.safetensors"

    def body() -> list[str]:
        engine = make_engine(STAGE)
        engine.save_16bit_model(quick_path)
        old = path.read_bytes()
        run_on(engine, to=1)
        texts = []
        for room in (0, 1, 8, 100, len(old) - 1):
            engine._disk = FullDisk(lambda path: True, room)
            with pytest.raises(CheckpointError) as caught:
                engine.save_16bit_model(quick_path)
            texts.append(str(caught.value))
            assert [each.name for each in quick_path.iterdir()] == [path.name]
            assert path.read_bytes() == old
            engine._sharded.comm.max([0.0], name="looked")
        engine._disk = Disk()
        engine.save_16bit_model(quick_path)
        assert path.read_bytes() != old
        return texts

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert all(f"{path}: weights cannot be saved (No space left on device)" in text for text in ended.result)
