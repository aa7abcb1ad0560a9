"""Files as torch.save writes them, of any pickle: what an attacker or a bad disk would make."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"  # % (elements,)


def write_zip(
    path: Path, pickle: bytes, records: Mapping[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """A file with this `data.pkl` and further records, such as {"data/0": bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def records_of(path: Path) -> dict[str, bytes]:
    """The records of a file of torch.save, without the name of the folder that they share."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, records: Mapping[str, bytes]) -> None:
    """Write the file anew with these records, checksums and all."""
    rest = dict(records)
    write_zip(path, rest.pop("data.pkl"), rest)


def tensor_pickle(*, elements: int, arguments: bytes) -> bytes:
    """A pickle of one fp32 tensor in the storage 0, of so many elements; `arguments` pickles offset, size, stride."""
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    return head + STORAGE % elements + arguments + b"\x89ccollections\nOrderedDict\n)RtR."
