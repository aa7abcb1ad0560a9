"""Files in blocks: what is put is what lies there, and what is read is what lies there, whatever the sizes."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from plain import config_for, start as start_engine
from zerolith.checkpoint import Disk, Reader, blocks
from zerolith.checkpoint.blocks import READS_AHEAD, BlockReader, BlockWriter, Span
from zerolith.checkpoint.content import Part
from zerolith.checkpoint.manifest import CHUNK_BYTES, checksum
from zerolith.checkpoint.shard_file import write_shard
from zerolith.errors import CheckpointError
from zerolith.memory.pages import ALIGNMENT, page_buffer, set_direct
from zerolith.memory.threads import helpers, start_task

CHUNK = 1000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small data takes many blocks, chunks and tasks."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(blocks, "TASK_BYTES", 4 * CHUNK)
    monkeypatch.setattr(blocks, "ALONE_BYTES", 500)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(READS_AHEAD) as threads:
        yield threads


def data_of(numbers: list[int]) -> list[bytes]:
    """Pieces of these sizes, no two of one content."""
    return [bytes((number + at * 7) % 251 for at in range(size)) for number, size in enumerate(numbers)]


def written(disk: Disk, pieces: list[bytes], threads: Any) -> tuple[bytes, list[list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        file = disk.create(path)
        writer = BlockWriter(disk, file, threads)
        memory = [memoryview(bytearray(piece)) for piece in pieces]
        tasks = [writer.put(each) for each in memory]
        writer.finish()
        writer.settle()
        os.close(file)
        return path.read_bytes(), [[digest for task in each for digest in task.result()] for each in tasks]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("block_bytes", [700, ALIGNMENT, 3 * ALIGNMENT])
@given(sizes=st.lists(st.integers(0, 20_000), max_size=8), has_threads=st.booleans())
@settings(max_examples=40)
def test_what_is_put_is_in_the_file_and_hashed(
    block_bytes: int, pool: ThreadPoolExecutor, sizes: list[int], has_threads: bool
) -> None:
    pieces = data_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "WRITE_BYTES", block_bytes)
        content, digests = written(Disk(), pieces, pool if has_threads else None)
    assert content == b"".join(pieces)
    assert digests == [
        [checksum(piece[start : start + CHUNK]) for start in range(0, len(piece), CHUNK)] for piece in pieces
    ]


class Slow(ThreadPoolExecutor):
    """Takes its time to begin."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        def begun() -> Any:
            time.sleep(0.01)
            return call(*args, **kwargs)

        return super().submit(begun)


def test_memory_that_parts_share_is_not_used_again_while_it_is_copied(tmp_path: Path) -> None:
    """As that through which tensors come from a device, or from a file of weights that rest there."""
    values = [torch.full((2**17,), float(number)) for number in range(24)]
    shared = torch.empty(2**17)

    def part(number: int) -> Part:
        whole = Part.whole(str(number), values[number])
        return replace(whole, data=whole.data.to("meta"), make=lambda: shared.copy_(values[number]))

    with Slow(1) as hashers, Slow(2) as copiers:
        for threads in (hashers, copiers, None):
            path = tmp_path / f"rank-00000-{0:016x}.safetensors"
            write_shard(Disk(), path, [part(number) for number in range(len(values))], checkpoint="", hashers=threads)
            read = load_file(path)
            assert {name: set(tensor.tolist()) for name, tensor in read.items()} == {
                str(number): {float(number)} for number in range(len(values))
            }
            path.unlink()


def test_a_copy_that_fails_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: Any) -> None:
        raise MemoryError("none left")

    file = Disk().create(tmp_path / "file")
    with ThreadPoolExecutor(1) as threads:
        writer = BlockWriter(Disk(), file, threads)
        monkeypatch.setattr(blocks, "_copy", scarce)
        writer.put(memoryview(bytearray(2**20)))
        with pytest.raises(MemoryError, match="none left"):
            writer.finish()
        writer.settle()
    os.close(file)


def test_memory_beside_the_data_is_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(blocks, "page_buffer", lambda nbytes: (taken.append(nbytes), page_buffer(nbytes))[1])
    written(Disk(), data_of([100] * 3), None)
    assert taken == [blocks.WRITE_BYTES] * 2


class Deaf(Disk):
    """A file system that takes no direct transfer, or only so many bytes at a time."""

    def __init__(self, most: int) -> None:
        self.most = most

    def write(self, file: int, data: memoryview) -> None:
        while data:
            super().write(file, data[: self.most])
            data = data[self.most :]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("most", [ALIGNMENT, 1000, 1])
def test_a_disk_that_takes_a_part_of_a_block_gets_the_rest(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WRITE_BYTES", 2 * ALIGNMENT)
    pieces = data_of([9000, 5000])
    assert written(Deaf(most), pieces, None)[0] == b"".join(pieces)


def test_a_direct_write_that_is_refused_goes_through_the_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.write, []

    def write(file: int, data: Any) -> int:
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr("zerolith.checkpoint.disk.set_direct", lambda file, wanted: True)
    pieces = data_of([ALIGNMENT])
    assert written(Disk(), pieces, None)[0] == b"".join(pieces)
    assert refused == [ALIGNMENT]


def test_another_error_of_a_write_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="Input/output"):
        written(Disk(), data_of([ALIGNMENT]), None)


def test_threads_that_cannot_start_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert helpers(0, "test") is None
    start, started = threading.Thread.start, []

    def scarce(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", scarce)
        assert helpers(2, "test") is None
    started[0].join(timeout=10)
    assert not started[0].is_alive(), "the one that could start is not left waiting"
    ended = helpers(1, "test")
    assert ended is not None
    ended.shutdown()
    assert start_task(ended, lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        start_task(ended, lambda: 1 // 0).result()
    pieces = data_of([100_000])
    assert written(Disk(), pieces, ended)[0] == pieces[0]


CONTENT = data_of([300_000])[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "file"
    path.write_bytes(CONTENT)
    return path


def read(path: Path, spans: list[tuple[int, int]], threads: Any, *, is_direct: bool = True) -> list[bytes]:
    file = os.open(path, os.O_RDONLY)
    set_direct(file, is_direct)
    try:
        reader = BlockReader(max([nbytes for _, nbytes in spans], default=0), threads)
        return [bytes(each) for each in reader.read([Span(file, offset, nbytes) for offset, nbytes in spans])]
    finally:
        os.close(file)


@given(
    spans=st.lists(st.tuples(st.integers(0, len(CONTENT) + 5000), st.integers(1, 70_000)), max_size=12),
    in_order=st.booleans(),
    is_direct=st.booleans(),
    has_threads=st.booleans(),
)
@settings(max_examples=120)
def test_spans_are_read_as_they_lie_there(
    path: Path,
    pool: ThreadPoolExecutor,
    spans: list[tuple[int, int]],
    in_order: bool,
    is_direct: bool,
    has_threads: bool,
) -> None:
    spans = sorted(spans) if in_order else spans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "READ_BYTES", 2 * ALIGNMENT)
        found = read(path, spans, pool if has_threads else None, is_direct=is_direct)
    assert found == [CONTENT[offset : offset + nbytes] for offset, nbytes in spans]


def test_neighbours_are_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *args: (calls.append(args[2]), real(*args))[1])
    spans = [(start, 1000) for start in range(100, 100_000, 1000)]
    assert read(path, spans, None) == [CONTENT[start : start + 1000] for start, _ in spans]
    assert calls == [0]


def test_memory_for_reading_is_less_than_two_buffers_of_16_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(blocks, "page_buffer", lambda nbytes: (taken.append(nbytes), page_buffer(1))[1])
    BlockReader(CHUNK_BYTES, None)
    assert sum(taken) < 2 * 16 * 2**20


def test_a_read_that_fails_is_told_when_its_turn_comes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(file: int, targets: Any, offset: int) -> int:
        if offset >= 2 * ALIGNMENT:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, targets, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(blocks, "READ_BYTES", 1)
    file = os.open(path, os.O_RDONLY)
    got = []
    with pytest.raises(OSError, match="Input/output"):
        for each in BlockReader(ALIGNMENT, None).read([Span(file, 3 * n * ALIGNMENT, ALIGNMENT) for n in range(3)]):
            got.append(bytes(each))
    os.close(file)
    assert got == [CONTENT[:ALIGNMENT]]


def test_reads_at_once_that_may_not_be_direct_all_go_through_the_page_cache(
    path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, together = os.preadv, threading.Barrier(READS_AHEAD)
    refused = []

    def preadv(file: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            together.wait(timeout=10)  # none falls back before all are refused
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, buffers, offset)

    monkeypatch.setattr(blocks, "READ_BYTES", 1)
    monkeypatch.setattr(blocks, "ALONE_BYTES", 0)
    monkeypatch.setattr(os, "preadv", preadv)
    spans = [(start, ALIGNMENT) for start in range(0, 8 * ALIGNMENT, 2 * ALIGNMENT)]
    assert read(path, spans, pool) == [path.read_bytes()[start : start + size] for start, size in spans]
    assert len(refused) == READS_AHEAD


def test_who_stops_reading_waits_for_what_is_under_way(path: Path, pool: ThreadPoolExecutor) -> None:
    file = os.open(path, os.O_RDONLY)
    reading = BlockReader(1000, pool).read([Span(file, start, 1000) for start in range(0, 299_000, 9999)])
    next(reading)
    reading.close()
    os.close(file)


def test_a_reader_without_memory_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start_engine(config_for(1, optimizer={"type": "AdamW"}))
    engine.save_checkpoint(tmp_path, tag="good")
    before, threads = os.listdir("/proc/self/fd"), threading.active_count()

    def scarce(nbytes: int) -> memoryview:
        raise MemoryError("none left")

    monkeypatch.setattr(blocks, "page_buffer", scarce)
    with pytest.raises(MemoryError, match="none left"):
        Reader(tmp_path / "good")
    assert os.listdir("/proc/self/fd") == before
    assert threading.active_count() == threads


def test_a_disk_that_does_not_give_a_checkpoints_bytes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(config_for(1, optimizer={"type": "AdamW"}))
    engine.save_checkpoint(tmp_path, tag="good")
    real = os.preadv

    def preadv(file: int, targets: Any, offset: int) -> int:
        if sum(map(len, targets)) > ALIGNMENT:  # not the header
            raise OSError(errno.EIO, "Input/output error")
        return real(file, targets, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"rank-00000-.*: bytes \d+ to \d+ of tensor .* cannot be read \(Input"):
        engine.load_checkpoint(tmp_path)
    monkeypatch.setattr(os, "preadv", real)
    assert engine.load_checkpoint(tmp_path)[0] is not None


def test_a_page_buffer_is_aligned_and_of_its_size() -> None:
    for nbytes in (1, ALIGNMENT, 10**6):
        memory = page_buffer(nbytes)
        assert len(memory) == nbytes
        memory[-1] = 7
        assert memory[-1] == 7
