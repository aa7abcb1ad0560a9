"""The corpus: source text of the running interpreter's standard library, as bytes.

Files are split by a hash of their relative path, so that no file is in both parts and a file's part
never depends on the other files. A token is a byte; a NUL separates files.
"""

from __future__ import annotations

import hashlib
import platform
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

SEPARATOR = b"\0"
VALIDATION_PERCENT = 5
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


class CorpusError(Exception):
    """The interpreter carries no standard library source to train on."""


class Batch(NamedTuple):
    """Inputs and the tokens that follow them, both (batch, seq_len) int64 on the CPU."""

    tokens: Tensor
    targets: Tensor


class Split(NamedTuple):
    """Relative POSIX paths of each part, sorted."""

    training: list[str]
    validation: list[str]


def is_validation(relative_path: str) -> bool:
    """Whether a file belongs to the validation part; depends on its path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < VALIDATION_PERCENT


def split_paths(relative_paths: Iterable[str]) -> Split:
    """Divide files into training and validation."""
    split = Split([], [])
    for path in sorted(set(relative_paths)):
        (split.validation if is_validation(path) else split.training).append(path)
    return split


def source_paths(root: Path) -> list[str]:
    """Relative POSIX paths of the Python files under `root`, installed packages left out."""
    relative = (path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    return [path for path in relative if EXCLUDED_FOLDERS.isdisjoint(PurePosixPath(path).parts)]


def read_stream(root: Path, relative_paths: Iterable[str]) -> bytes:
    """The files' bytes in the given order, each followed by the separator."""
    return b"".join((root / path).read_bytes() + SEPARATOR for path in relative_paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Both token streams, 1-d uint8, and what identifies the text they were read from."""

    training: Tensor
    validation: Tensor
    num_files: int
    digest: str  # of all bytes: equal digests are equal corpora

    def __str__(self) -> str:
        training, validation = len(self.training) / 1e6, len(self.validation) / 1e6
        source = f"{self.num_files:,} files of Python {platform.python_version()}'s library"
        return f"corpus: {source}, {training:.1f} MB to train on, {validation:.1f} MB to validate on"

    @classmethod
    def of_standard_library(cls, root: Path | None = None) -> Corpus:
        """Read the running interpreter's library, or the Python files under `root`."""
        root = root or Path(sysconfig.get_paths()["stdlib"])
        split = split_paths(source_paths(root))
        training, validation = read_stream(root, split.training), read_stream(root, split.validation)
        if not training or not validation:
            raise CorpusError(f"{root} holds too few .py files to train on; use an interpreter with its sources")
        return cls(
            training=torch.frombuffer(bytearray(training), dtype=torch.uint8),
            validation=torch.frombuffer(bytearray(validation), dtype=torch.uint8),
            num_files=len(split.training) + len(split.validation),
            digest=hashlib.sha256(training + validation).hexdigest()[:16],
        )


def cut(stream: Tensor, starts: Iterable[int], *, seq_len: int) -> Batch:
    """Stack the windows of `stream` that begin at `starts`."""
    windows = torch.stack([stream[start : start + seq_len + 1] for start in starts]).long()
    return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatches:
    """Random windows of the training stream, a pure function of (seed, batch index)."""

    stream: Tensor
    batch_size: int
    seq_len: int
    seed: int

    def batch(self, index: int) -> Batch:
        """The micro-batch of that index, the same on every rank and in every run."""
        # A string seed is hashed by `random` itself, so neighbouring indices are unrelated.
        draw = random.Random(f"{self.seed}/{index}")
        last_start = len(self.stream) - self.seq_len - 1
        starts = [draw.randint(0, last_start) for _ in range(self.batch_size)]
        return cut(self.stream, starts, seq_len=self.seq_len)


def validation_batches(stream: Tensor, *, batch_size: int, seq_len: int, num_windows: int) -> list[Batch]:
    """Evenly spaced windows that do not overlap, or fewer if the stream is shorter."""
    available = (len(stream) - 1) // seq_len
    count = min(num_windows, available)
    if count == 0:
        raise CorpusError(f"the validation text has {len(stream)} bytes; --seq-len {seq_len} is too long for it")
    starts = [(window * available // count) * seq_len for window in range(count)]
    groups = [starts[first : first + batch_size] for first in range(0, count, batch_size)]
    return [cut(stream, group, seq_len=seq_len) for group in groups]
