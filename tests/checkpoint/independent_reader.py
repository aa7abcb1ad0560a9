"""A reader of checkpoints that follows docs/checkpoint-format.md alone: it imports nothing of the library.

    checkpoint = open_checkpoint("checkpoints")  # a job's folder, or a tag's
    checkpoint.verify()
    weight = checkpoint.tensor("value/embed.weight")
    epoch = checkpoint.state("client")["epoch"]

Dtypes that numpy lacks: BF16 is widened to float32, which keeps every bit; tensors of 8-bit floats are given as their
bytes, scalars of them as float32.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

TOP_KEYS = "format version id created libraries step num_ranks chunk_bytes files tensors parameters state xxh3"
STATE_KEYS = "counters scaler scheduler loader optimizer extra_state client ranks"
NUMPY_NAMES = {
    **{"BOOL": "?", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "i1", "I16": "<i2", "I32": "<i4"},
    **{"I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8"},
    **{"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"},
}
DTYPES = {name: np.dtype(numpy_name) for name, numpy_name in NUMPY_NAMES.items()}


class CheckpointError(Exception):
    """No checkpoint of this format, or a damaged one."""


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a tag's folder or the newest one in a job's folder; everything but tensor data is checked."""
    path = Path(folder)
    if not os.path.lexists(path / "manifest.json"):
        tag, *rest = _read(path / "latest").split(b"\n")
        _require(rest == [_checksum(tag), b""], f"{path / 'latest'} is damaged")
        _require(tag != b"" and not tag.startswith(b".") and b"/" not in tag, f"{tag!r} is no tag")
        path = path / os.fsdecode(tag)
        _require(not path.is_symlink(), f"{path} is a symbolic link")
    return Checkpoint(path)


class Checkpoint:
    """One checkpoint, its manifest and file headers checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = _read_manifest(folder / "manifest.json")
            self._tensors: dict[str, Any] = self.manifest["tensors"]
            entries: list[dict[str, Any]] = [{} for _ in self.manifest["files"]]
            for name in self._tensors:
                self._place(name, entries)
            for file, expected in zip(self.manifest["files"], entries, strict=True):
                self._check_file(file, expected)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder}: a value is missing or of the wrong kind: {error!r}") from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor; every byte of it is checked on the way."""
        _require(name in self._tensors, f"there is no tensor {name!r}")
        dtype, shape = self._tensors[name]["dtype"], self._tensors[name]["shape"]
        flat = np.frombuffer(bytearray().join(self._checked_chunks(name)), DTYPES[dtype])
        if dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(shape)

    def state(self, key: str) -> Any:
        return self._decode(self.manifest["state"][key])

    def parameter(self, name: str) -> Any:
        return self._decode(self.manifest["parameters"][name])

    def verify(self) -> None:
        """Check every byte of tensor data and decode all that is no tensor."""
        for name in self._tensors:
            for _ in self._checked_chunks(name):
                pass
        self._decode([self.manifest["state"], self.manifest["parameters"]])

    def _place(self, name: str, entries: list[dict[str, Any]]) -> None:
        """Check that the pieces make the whole; note what each file's header should say of them."""
        tensor = _with_keys(self._tensors[name], "dtype shape pieces", name)
        count, at = math.prod(tensor["shape"]), 0
        for piece in tensor["pieces"]:
            start, stop = _with_keys(piece, "file start stop offset xxh3", name)["start"], piece["stop"]
            _require(start == at < stop and piece["file"] >= 0, f"{name}: the pieces do not follow each other")
            whole, at = stop - start == count, stop
            entries[piece["file"]][name if whole else f"{name}[{start}:{stop}]"] = {
                "dtype": tensor["dtype"],
                "shape": tensor["shape"] if whole else [stop - start],
                "data_offsets": [piece["offset"], piece["offset"] + (stop - start) * DTYPES[tensor["dtype"]].itemsize],
            }
        _require(at == count, f"{name}: the pieces do not make the whole")

    def _check_file(self, file: dict[str, Any], expected: dict[str, Any]) -> None:
        """Check a file's size and header, and that header and pieces are all there is."""
        name, size = _with_keys(file, "name bytes header_xxh3", "a file")["name"], file["bytes"]
        _require("/" not in name and self.manifest["id"] in name, f"{name!r} is no name of a data file")
        path, begin = self.folder / name, 8 + int.from_bytes(_read(self.folder / name, 0, 8), "little")
        _require(path.stat().st_size == size, f"{name} is not {size} bytes long")
        raw = _read(path, 0, min(begin, size))
        _require(_checksum(raw) == file["header_xxh3"].encode(), f"the header of {name} does not match its checksum")
        header = json.loads(raw[8:])
        _require(header.pop("__metadata__")["checkpoint"] == self.manifest["id"], f"{name} is of another checkpoint")
        header = {key: entry for key, entry in header.items() if 0 not in entry["shape"]}  # these have no pieces
        for entry in header.values():
            entry["data_offsets"] = [begin + offset for offset in entry["data_offsets"]]
        _require(header == expected, f"the header of {name} and the manifest differ")
        starts, stops = zip([size, begin], *(entry["data_offsets"] for entry in header.values()), strict=True)
        _require(
            sorted(starts) == sorted(stops), f"{name} has bytes in no piece or in two"
        )  # each begins where one ends

    def _checked_chunks(self, name: str) -> Iterator[bytes]:
        step = self.manifest["chunk_bytes"]
        for piece in self._tensors[name]["pieces"]:
            path = self.folder / self.manifest["files"][piece["file"]]["name"]
            length = (piece["stop"] - piece["start"]) * DTYPES[self._tensors[name]["dtype"]].itemsize
            starts = range(0, length, step)
            _require(len(piece["xxh3"]) == len(starts), f"{name} has not one checksum for each chunk")
            for start, checksum in zip(starts, piece["xxh3"], strict=True):
                chunk = _read(path, piece["offset"] + start, min(step, length - start))
                _require(_checksum(chunk) == checksum.encode(), f"{path}: {name} does not match its checksum")
                yield chunk

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = next(iter(value), "")
        if len(value) != 1 or not kind.startswith("$"):
            return {key: self._decode(item) for key, item in value.items()}
        content = value[kind]
        if kind == "$float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if kind == "$tuple":
            return tuple(self._decode(content))
        if kind in ("$dict", "$counter"):
            pairs = {self._decode(key): self._decode(item) for key, item in content}
            return pairs if kind == "$dict" else Counter(pairs)
        if kind == "$scalar":
            dtype = np.float32 if content[0].startswith(("BF16", "F8")) else DTYPES[content[0]]
            return np.array(self._decode(content[1]), dtype)
        if kind == "$tensor":
            return self.tensor(content)
        raise CheckpointError(f"an object of an unknown kind: {kind}")


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = _read(path)
    _require(raw[-30:] == b',\n"xxh3": "%b"}\n' % _checksum(raw[:-30]), f"{path} is damaged")
    manifest: dict[str, Any] = json.loads(raw)
    _require((manifest["format"], manifest["version"]) == ("zerolith-checkpoint", 1), f"{path} is of another format")
    _with_keys(_with_keys(manifest, TOP_KEYS, "the manifest")["state"], STATE_KEYS, "state")
    for name, parameter in manifest["parameters"].items():
        _with_keys(parameter, "shape dtype trained aliases optimizer", name)
    return manifest


def _read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes of a file, or all from `offset` on."""
    try:
        _require(stat.S_ISREG(path.lstat().st_mode), f"{path} is no regular file")
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _require(size in (-1, len(data)), f"{path} ends early")
    return data


def _with_keys(value: dict[str, Any], keys: str, what: str) -> dict[str, Any]:
    _require(value.keys() == set(keys.split()), f"{what} has other keys than this reader knows: {sorted(value)}")
    return value


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(problem)


def _checksum(data: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(data).encode()
