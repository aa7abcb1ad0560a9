"""Ways in which files of a checkpoint go bad, one table: what is done to them, and what a reader must say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from zerolith.checkpoint.manifest import DTYPES, MANIFEST, Manifest, read_manifest

PAGE = 4096


class Damage(NamedTuple):
    """Something done to a checkpoint."""

    spoil: Callable[[Path, Path], Path]  # (its folder, that of another one of the same model) -> the file that is bad
    words: str = ""  # a pattern that the message has beside the file's name
    is_found_late: bool = False  # only when tensors are read, of which some have been loaded by then


def shard_of(home: Path, rank: int) -> Path:
    (path,) = home.glob(f"rank-{rank:05d}-*.safetensors")
    return path


def flip(path: Path, at: int, bit: int = 0) -> Path:
    """Flip one bit of a byte, counted from the end if `at` is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return path


class Piece(NamedTuple):
    """Bytes of a file that belong to a tensor."""

    tensor: str
    start: int
    stop: int


def pieces_of(manifest: Manifest, path: Path) -> list[Piece]:
    """The pieces in a data file, in order."""
    number = [file.name for file in manifest.files].index(path.name)
    found = []
    for name, tensor in manifest.tensors.items():
        size = DTYPES[tensor.dtype].itemsize
        for piece in tensor.pieces:
            if piece.file == number:
                found.append(Piece(name, piece.offset, piece.offset + (piece.stop - piece.start) * size))
    return sorted(found, key=lambda piece: piece.start)


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def named_bytes(text: str) -> Piece:
    """What a message says to be wrong."""
    match = re.search(r"bytes (\d+) to (\d+) of tensor '([^']+)' are not what was saved", text)
    assert match is not None, text
    return Piece(match[3], int(match[1]), int(match[2]))


def _shard(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    """Change the data file of rank 1."""

    def spoil(home: Path, other: Path) -> Path:
        path = shard_of(home, 1)
        change(path)
        return path

    return spoil


def _file(name: str, change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def spoil(home: Path, other: Path) -> Path:
        change(home / name)
        return home / name

    return spoil


def _flip_tensor(at: Callable[[Piece], int]) -> Callable[[Path, Path], Path]:
    """Flip a bit in the second tensor of rank 1's file."""

    def spoil(home: Path, other: Path) -> Path:
        path = shard_of(home, 1)
        return flip(path, at(pieces_of(read_manifest(home), path)[1]), bit=3)

    return spoil


def _zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[PAGE : 2 * PAGE] = bytes(PAGE)
    path.write_bytes(data)


def _truncate(size: Callable[[int], int]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes((data + b"\0")[: size(len(data))])

    return change


def _swap(home: Path, other: Path) -> Path:
    first, second = shard_of(home, 0), shard_of(home, 1)
    first_data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_data)
    return first


def _copy_shard(home: Path, other: Path) -> Path:
    shutil.copy(shard_of(other, 1), shard_of(home, 1))
    return shard_of(home, 1)


def _copy_manifest(home: Path, other: Path) -> Path:
    shutil.copy(other / MANIFEST, home / MANIFEST)
    return home / shard_of(other, 0).name


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HEADER = r"its header is not what was written"
CONTENT = r"bytes \d+ to \d+ of tensor '[^']+' are not what was saved \(their checksum is wrong\)"
SIZE = r"it has \d+ bytes, and \d+ were written"
CHECKSUM = r"its content does not match its checksum"
CUT = r"it does not end with its checksum"

DAMAGES: dict[str, Damage] = {
    "bit in the length of a header": Damage(_shard(lambda path: flip(path, 1)), HEADER),
    "highest bit in the length of a header": Damage(_shard(lambda path: flip(path, 7, bit=7)), HEADER),
    "bit in a header": Damage(_shard(lambda path: flip(path, 100)), HEADER),
    "bit in a header's padding": Damage(_shard(lambda path: flip(path, header_bytes(path) - 1)), HEADER),
    "bit in a tensor's first byte": Damage(_flip_tensor(lambda piece: piece.start), CONTENT, is_found_late=True),
    "bit in a tensor's last byte": Damage(_flip_tensor(lambda piece: piece.stop - 1), CONTENT, is_found_late=True),
    "bit in the last byte of a file": Damage(_shard(lambda path: flip(path, -1)), CONTENT, is_found_late=True),
    "page of zeros": Damage(_shard(_zero_page), CONTENT, is_found_late=True),
    "file cut by a byte": Damage(_shard(_truncate(lambda size: size - 1)), SIZE),
    "file cut in half": Damage(_shard(_truncate(lambda size: size // 2)), SIZE),
    "file of 5 bytes": Damage(_shard(_truncate(lambda size: 5)), SIZE),
    "empty file": Damage(_shard(_truncate(lambda size: 0)), SIZE),
    "file with a byte more": Damage(_shard(_truncate(lambda size: size + 1)), SIZE),
    "missing file": Damage(_shard(Path.unlink), "missing"),
    "folder in place of a file": Damage(_shard(_replace_by_folder), "not a regular file"),
    "files of two ranks swapped": Damage(_swap, f"({SIZE}|{HEADER})"),
    "file of another checkpoint": Damage(_copy_shard, "it belongs to another checkpoint"),
    "manifest of another checkpoint": Damage(_copy_manifest, "missing"),
    "bit in the manifest": Damage(_file(MANIFEST, lambda path: flip(path, 500)), CHECKSUM),
    "bit in the manifest's checksum": Damage(_file(MANIFEST, lambda path: flip(path, -10)), f"({CHECKSUM}|{CUT})"),
    "manifest cut by a byte": Damage(_file(MANIFEST, _truncate(lambda size: size - 1)), CUT),
    "manifest cut in half": Damage(_file(MANIFEST, _truncate(lambda size: size // 2)), CUT),
    "empty manifest": Damage(_file(MANIFEST, _truncate(lambda size: 0)), CUT),
    "bit in latest": Damage(_file("../latest", lambda path: flip(path, 3)), "it is not what was written"),
    "bit in latest's checksum": Damage(_file("../latest", lambda path: flip(path, -5)), "it is not what was written"),
    "empty latest": Damage(_file("../latest", _truncate(lambda size: 0)), "it is not what was written"),
}
