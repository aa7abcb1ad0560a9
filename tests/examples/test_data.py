"""The corpus: what is in it, how it is split, and which windows are cut from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt.data import (
    SEPARATOR,
    Corpus,
    CorpusError,
    TrainingBatches,
    is_validation,
    read_stream,
    source_paths,
    split_paths,
    validation_batches,
)

PATHS = [f"package{number % 7}/module{number}.py" for number in range(1000)]
STREAM = torch.arange(1000).remainder(251).to(torch.uint8)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of sources in which both parts of the split have some."""
    for number in range(200):
        file = tmp_path / f"package{number % 3}" / f"module{number}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"NUMBER = {number}\n")
    return tmp_path


def batches(*, seed: int = 0) -> TrainingBatches:
    return TrainingBatches(stream=STREAM, batch_size=3, seq_len=16, seed=seed)


def test_no_file_is_in_both_parts_and_none_is_lost() -> None:
    training, validation = split_paths(PATHS)
    assert not {*training} & {*validation}
    assert {*training, *validation} == {*PATHS}


def test_the_split_is_about_one_in_twenty() -> None:
    assert 30 <= len(split_paths(PATHS).validation) <= 70


def test_the_split_does_not_depend_on_order_repetition_or_the_other_files() -> None:
    whole = split_paths(PATHS)
    assert split_paths([*reversed(PATHS), *PATHS]) == whole
    assert split_paths(PATHS[:100]).validation == sorted({*PATHS[:100]} & {*whole.validation})


def test_the_split_is_the_same_in_every_process() -> None:
    # `hash` of a string would differ from process to process.
    assert [path for path in PATHS[:30] if is_validation(path)] == ["package1/module29.py"]


def test_installed_packages_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "site-packages/c.py", "d/dist-packages/e.py", "test/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert sorted(source_paths(tmp_path)) == ["a.py", "test/f.py"]


def test_a_stream_is_the_files_bytes_with_separators(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "b.py").write_bytes(b"\xff")
    assert read_stream(tmp_path, ["b.py", "a.py"]) == b"\xff" + SEPARATOR + b"x = 1\r\n" + SEPARATOR


def test_a_corpus_read_twice_is_the_same(library: Path) -> None:
    first, second = Corpus.of_standard_library(library), Corpus.of_standard_library(library)
    assert first.digest == second.digest
    assert torch.equal(first.training, second.training)
    assert first.num_files == 200
    assert len(first.training) > len(first.validation) > 0


def test_a_folder_without_sources_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=str(tmp_path)):
        Corpus.of_standard_library(tmp_path)


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = batches().batch(0)
    assert tokens.shape == targets.shape == (3, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_batch_is_a_function_of_seed_and_index() -> None:
    assert torch.equal(batches().batch(5).tokens, batches().batch(5).tokens)
    assert not torch.equal(batches().batch(5).tokens, batches().batch(6).tokens)
    assert not torch.equal(batches().batch(5).tokens, batches(seed=1).batch(5).tokens)


def test_validation_windows_do_not_overlap_and_keep_their_number() -> None:
    parts = validation_batches(torch.arange(1000), batch_size=4, seq_len=10, num_windows=30)
    assert [len(part.tokens) for part in parts] == [4] * 7 + [2]
    seen = torch.cat([part.tokens.flatten() for part in parts])
    assert len(seen.unique()) == len(seen) == 300


def test_a_short_stream_gives_fewer_windows_and_an_empty_one_an_error() -> None:
    (part,) = validation_batches(torch.arange(31), batch_size=4, seq_len=10, num_windows=30)
    assert torch.equal(part.targets, torch.arange(1, 31).view(3, 10))
    with pytest.raises(CorpusError, match="--seq-len 10"):
        validation_batches(torch.arange(10), batch_size=4, seq_len=10, num_windows=30)
