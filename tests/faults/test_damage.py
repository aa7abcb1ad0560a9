"""What lies on disk is not what was written: refused on all ranks, by file, tensor and bytes, and never trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.damage import DAMAGES, Damage, flip, header_bytes, named_bytes, pieces_of, shard_of
from faults.disks import FaultyDisk, ForgetfulDisk
from faults.jobs import run_job
from faults.scenarios import Save, run_save, solo_content
from faults.states import checkpoint_digest, engine_digest, left_overs, make_engine, redirected, run_on, solo_saver
from plain import loss_of, make_batches, my_micro_batches
from zerolith.checkpoint import Content, Disk, Part, Reader, find
from zerolith.checkpoint.folder import read_latest
from zerolith.checkpoint.manifest import CHUNK_BYTES, MANIFEST, read_manifest
from zerolith.errors import CheckpointDamagedError, CheckpointError, UsageError
from zerolith.layout import Range

WORLD, STAGE = 2, 3
EARLY = [name for name, damage in DAMAGES.items() if not damage.is_found_late]
LATE = [name for name, damage in DAMAGES.items() if damage.is_found_late]


# --- every byte, without ranks ----------------------------------------------------------------------


def save_two_ranks(folder: Path, step: int = 1) -> Path:
    run_save(STAGE, folder, Save(f"global_step{step}", step), [FaultyDisk(is_volatile=True) for _ in range(WORLD)])
    return folder / f"global_step{step}"


def refusal(home: Path) -> str:
    """What a reader says of a damaged checkpoint."""
    with pytest.raises(CheckpointDamagedError) as caught:
        with Reader(home) as reader:
            for name in reader.manifest.tensors:
                for _ in reader.blocks(name):
                    pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_flipped_bit_anywhere_in_a_data_file_is_found_and_named(rank: int, quick_path: Path) -> None:
    home = save_two_ranks(quick_path)
    path = shard_of(home, rank)
    pieces, size, head = pieces_of(read_manifest(home), path), path.stat().st_size, header_bytes(path)
    assert [head, *(piece.stop for piece in pieces)] == [*(piece.start for piece in pieces), size], "bytes of nobody"
    edges = {at for piece in pieces for at in (piece.start, piece.stop - 1)}
    places = sorted({*range(8), *range(8, head, 13), head - 1, *range(head, size, 61), *edges})
    assert len(places) > 250
    for at in places:
        flip(path, at, bit=at % 8)
        text = refusal(home)
        assert text.startswith(f"{path}: ")
        if at >= head:
            named = named_bytes(text)
            assert named in pieces
            assert named.start <= at < named.stop
        flip(path, at, bit=at % 8)
    assert checkpoint_digest(home)


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(quick_path: Path) -> None:
    path = save_two_ranks(quick_path) / MANIFEST
    size = path.stat().st_size
    for at in {*range(0, size, 7), *range(size - 40, size)}:
        for bit in (0, 6):
            flip(path, at, bit=bit)
            assert refusal(path.parent).startswith(f"{path}: ")
            flip(path, at, bit=bit)
    assert checkpoint_digest(path.parent)


def test_any_flipped_bit_in_latest_is_found(quick_path: Path) -> None:
    save_two_ranks(quick_path)
    path = quick_path / "latest"
    for at in range(path.stat().st_size):
        for bit in range(8):
            flip(path, at, bit=bit)
            with pytest.raises(CheckpointDamagedError, match=f"^{path}: "):
                find(quick_path, None)
            assert find(quick_path, None, all_whole=True) == ["global_step1"]
            flip(path, at, bit=bit)
    assert read_latest(quick_path) == "global_step1"


def test_every_length_of_a_file_but_its_own_is_refused(quick_path: Path) -> None:
    home = save_two_ranks(quick_path)
    for path in home.iterdir():
        data = path.read_bytes()
        for length in {*range(0, len(data), 97), 1, 8, len(data) - 1}:
            path.write_bytes(data[:length])
            assert refusal(home).startswith(f"{path}: ")
        path.write_bytes(data)
    assert checkpoint_digest(home)


def test_of_a_large_tensor_only_the_damaged_chunk_is_refused(quick_path: Path) -> None:
    numel = 3 * CHUNK_BYTES // 4 + 1000
    whole = torch.arange(numel, dtype=torch.float32)
    job = redirected(solo_content(STAGE, 1), quick_path, tag="large", content=Content(parts=[Part.whole("t", whole)]))
    saver = solo_saver(Disk())
    saver.save(job)
    saver.close()
    (path,) = (quick_path / "large").glob("rank-*")
    head = header_bytes(path)
    per_chunk = CHUNK_BYTES // 4
    for chunk in range(4):
        start, stop = chunk * per_chunk, min(numel, (chunk + 1) * per_chunk)
        flip(path, head + 4 * start + 77)
        with Reader(quick_path / "large") as reader:
            with pytest.raises(CheckpointDamagedError) as caught:
                reader.tensor("t")
            assert named_bytes(str(caught.value)) == ("t", head + 4 * start, head + 4 * stop)
            for first, last in ((0, start), (stop, numel)):
                part = Part(name="t", shape=(numel,), range=Range(first, last), data=torch.empty(last - first))
                reader.fill([part])
                assert torch.equal(part.data, whole[first:last])
        flip(path, head + 4 * start + 77)


# --- engines ----------------------------------------------------------------------------------------


def prepare(folder: Path, stage: int = STAGE) -> Any:
    """Two checkpoints, steps 1 and 2, in a rank; returns the engine, at step 2. Collective."""
    engine = make_engine(stage)
    for step in (1, 2):
        run_on(engine, to=step)
        engine.save_checkpoint(folder)
    return engine


def spoilt_copy(engine: Any, folder: Path, damage: Damage, target: Path) -> Path:
    """A copy whose newest checkpoint is damaged; returns the bad file. Collective."""
    bad = target
    if engine.global_rank == 0:
        shutil.copytree(folder, target)
        bad = damage.spoil(target / "global_step2", target / "global_step1")
    paths = engine._sharded.comm.all_gather_bytes(str(bad).encode(), name="bad file")
    return Path(paths[0].decode())


def refused_load(engine: Any, folder: Path, **kwargs: Any) -> str:
    with pytest.raises(CheckpointDamagedError) as caught:
        engine.load_checkpoint(folder, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def check_text(text: str, bad: Path, damage: Damage) -> None:
    import re

    assert f"{bad.parent.resolve()}/{bad.name}: " in text, text
    assert re.search(damage.words, text), text


def test_a_checkpoint_that_cannot_be_read_leaves_the_model_as_it_is(quick_path: Path) -> None:
    def body() -> list[str]:
        engine = prepare(quick_path / "good")
        run_on(engine, to=3)
        before, done = engine_digest(engine), []
        for number, name in enumerate(EARLY):
            bad = spoilt_copy(engine, quick_path / "good", DAMAGES[name], quick_path / str(number))
            check_text(refused_load(engine, quick_path / str(number)), bad, DAMAGES[name])
            assert engine_digest(engine) == before, name
            assert engine.global_steps == 3
            done.append(name)
        run_on(engine, to=4)
        return done

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert ended.result == EARLY


def calls_that_train(engine: Any, folder: Path) -> list[Callable[[], object]]:
    batch = next(iter(my_micro_batches(make_batches(1, 4)[0])))
    return [
        lambda: engine(batch.x),
        lambda: engine.backward(loss_of(engine.module, batch)),
        lambda: engine.step(),
        lambda: engine.save_checkpoint(folder),
        lambda: engine.save_16bit_model(folder),
    ]


@pytest.mark.parametrize("stage", [1, 3])  # at 1 ranks exchange weights while they read
def test_a_mixture_is_not_trained_until_something_else_is_loaded(stage: int, quick_path: Path) -> None:
    def body() -> list[str]:
        engine = prepare(quick_path / "good", stage)
        run_on(engine, to=3)
        expected, done = engine_digest(engine), []
        for number, name in enumerate(LATE):
            bad = spoilt_copy(engine, quick_path / "good", DAMAGES[name], quick_path / str(number))
            check_text(refused_load(engine, quick_path / str(number)), bad, DAMAGES[name])
            for call in calls_that_train(engine, quick_path / "never"):
                with pytest.raises(UsageError, match="are a mixture; load a checkpoint"):
                    call()
            refused_load(engine, quick_path / str(number))
            engine.load_checkpoint(quick_path / "good")
            run_on(engine, to=3)
            assert engine_digest(engine) == expected, name
            done.append(name)
        assert not (quick_path / "never").exists()
        return done

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert ended.result == LATE


def test_if_asked_to_the_checkpoint_before_the_damaged_one_is_loaded(quick_path: Path) -> None:
    def body() -> list[str]:
        engine = prepare(quick_path / "good")
        cautious = make_engine(STAGE, checkpoint={"on_damage": "previous"})
        cautious.load_checkpoint(quick_path / "good", tag="global_step1")
        old, done = engine_digest(cautious), []
        new = engine_digest(engine)
        for number, (name, damage) in enumerate(DAMAGES.items()):
            folder = quick_path / str(number)
            bad = spoilt_copy(cautious, quick_path / "good", damage, folder)
            home, _ = cautious.load_checkpoint(folder)
            is_old = bad.name != "latest"  # without it the newest is found all the same
            assert Path(home) == folder / ("global_step1" if is_old else "global_step2"), name
            assert engine_digest(cautious) == (old if is_old else new), name
            check_text(refused_load(engine, folder), bad, damage)
            done.append(name)
        run_on(cautious, to=3)
        return done

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert ended.result == [*DAMAGES]


def test_if_all_are_damaged_the_last_one_s_error_is_raised(quick_path: Path) -> None:
    def body() -> str:
        engine = prepare(quick_path)
        cautious = make_engine(STAGE, checkpoint={"on_damage": "previous"})
        if engine.global_rank == 0:
            for step in (1, 2):
                flip(shard_of(quick_path / f"global_step{step}", 0), -1)
        engine._sharded.comm.max([0.0], name="spoilt")
        return refused_load(cautious, quick_path)

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert "/global_step1/rank-00000-" in ended.result


@pytest.mark.parametrize("stage", [0, 3])
def test_damage_is_found_by_any_number_of_ranks(stage: int, quick_path: Path) -> None:
    def save() -> None:
        prepare(quick_path)

    def body() -> None:
        engine = make_engine(stage)
        before = engine_digest(engine)
        refused_load(engine, quick_path)
        refused_load(engine, quick_path, tag="global_step1")
        with pytest.raises(UsageError, match="are a mixture"):
            engine.step()
        fresh = make_engine(stage)
        refused_load(fresh, quick_path)
        assert engine_digest(fresh) == before

    assert [ended.text for ended in run_job(WORLD, save)] == [""] * WORLD
    shard_of(quick_path / "global_step2", 1).unlink()
    home = quick_path / "global_step1"
    first = next(piece for piece in pieces_of(read_manifest(home), shard_of(home, 0)) if piece.tensor.startswith("val"))
    flip(shard_of(home, 0), first.start)
    for world in (1, 3):
        assert [ended.text for ended in run_job(world, body)] == [""] * world


# --- a disk that forgets ----------------------------------------------------------------------------

LIES = {
    "header": (lambda path: "rank-00001" in path.name, 30),
    "tensor": (lambda path: "rank-00001" in path.name, -1),
    "manifest": (lambda path: path.name == f"{MANIFEST}.new", 300),
    "latest": (lambda path: path.name == "latest.new", 3),
}


@pytest.mark.parametrize("tag", ["global_step2", "global_step1"])
@pytest.mark.parametrize("name", LIES)
def test_what_the_disk_got_wrong_does_not_become_a_checkpoint_if_it_is_read_back(
    name: str, tag: str, quick_path: Path
) -> None:
    matches, at = LIES[name]

    def body() -> str:
        engine = make_engine(STAGE, checkpoint={"verify_after_save": True})
        run_on(engine, to=1)
        engine.save_checkpoint(quick_path)
        old = checkpoint_digest(quick_path / "global_step1")
        size = shard_of(quick_path / "global_step1", 1).stat().st_size
        run_on(engine, to=2)
        engine._saver.disk = ForgetfulDisk(matches, at=at % size)
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(quick_path, tag=tag)
        engine._saver.disk = Disk()
        assert find(quick_path, None) == ["global_step1"]
        assert name == "latest" or checkpoint_digest(quick_path / "global_step1") == old
        assert name == "latest" or left_overs(quick_path) == []
        engine._sharded.comm.max([0.0], name="looked")
        engine.save_checkpoint(quick_path, tag=tag)
        assert engine.load_checkpoint(quick_path)[0] == str(quick_path / tag)
        return str(caught.value)

    for ended in run_job(WORLD, body):
        assert ended.status == 0, ended
        assert "the disk or its driver is broken" in ended.result
