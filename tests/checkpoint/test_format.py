"""The manifest and the values in it: what goes in comes out, and nothing else goes in."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from zerolith.checkpoint.manifest import (
    TRAILER_BYTES,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    checksum,
    decode,
    encode,
)
from zerolith.checkpoint.values import from_json, to_json
from zerolith.errors import CheckpointDamagedError, CheckpointError

DOCS = Path(__file__).parents[2] / "docs"
ID = "0123456789abcdef"
HERE = Path("manifest.json")

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=12,
)


def manifest(**changes: Any) -> Manifest:
    record = TensorRecord(dtype="F32", shape=[2, 3], pieces=[piece(0, 4), piece(4, 6, offset=116)])
    fields: dict[str, Any] = {
        "id": ID,
        "created": "2030-01-01T00:00:00+00:00",
        "libraries": {},
        "step": 3,
        "num_ranks": 2,
        "files": [FileRecord(name=f"rank-00000-{ID}.safetensors", bytes=124, header_xxh3=ID)],
        "tensors": {"value/w": record},
        "parameters": {},
        "state": {},
    }
    return Manifest(**{**fields, **changes})


def piece(start: int, stop: int, *, offset: int = 100, file: int = 0, digests: int = 1) -> Piece:
    return Piece(file=file, start=start, stop=stop, offset=offset, xxh3=[ID] * digests)


def same(one: Any, other: Any) -> bool:
    """Equal in type, too; NaN equals NaN."""
    if isinstance(one, float) and isinstance(other, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (one != one and other != other)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(same(list(a), list(b)) for a, b in pairs)
    return type(one) is type(other) and bool(one == other)


@given(values)
def test_any_value_survives_json(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(to_json(value, where="client_state", tensors=tensors), allow_nan=False)
    assert same(from_json(json.loads(text), tensor=tensors.__getitem__), value)


@given(st.dictionaries(st.text(), values))
def test_any_state_survives_the_manifest(state: dict[str, Any]) -> None:
    encoded = {key: to_json(value, where=key, tensors={}) for key, value in state.items()}
    back = decode(encode(manifest(state=encoded)), where=HERE).state
    assert same(dict(back), encoded)


def test_tensors_of_one_name_are_kept_apart() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    back = from_json(to_json(value, where="x", tensors=tensors), tensor=tensors.__getitem__)
    assert back["a/b"].item() == 1
    assert back["a"]["b"].item() == 0


def test_a_kind_of_the_future_is_refused() -> None:
    with pytest.raises(CheckpointError, match="later version"):
        from_json({"$matrix": []}, tensor=dict[str, torch.Tensor]().__getitem__)


def test_the_manifest_is_json_that_ends_with_its_checksum() -> None:
    data = encode(manifest())
    assert decode(data, where=HERE) == manifest()
    assert json.loads(data)["xxh3"] == checksum(data[:-TRAILER_BYTES])
    assert re.fullmatch(rb',\n"xxh3": "[0-9a-f]{16}"}\n', data[-TRAILER_BYTES:])


def test_every_flipped_bit_of_a_manifest_is_noticed() -> None:
    data = encode(manifest())
    for position in range(len(data)):
        for bit in range(8):
            wrong = bytearray(data)
            wrong[position] ^= 1 << bit
            with pytest.raises(CheckpointDamagedError):
                decode(bytes(wrong), where=HERE)


def test_every_cut_of_a_manifest_is_noticed() -> None:
    data = encode(manifest())
    for length in range(len(data)):
        with pytest.raises(CheckpointDamagedError):
            decode(data[:length], where=HERE)


def signed(body: dict[str, Any]) -> bytes:
    """What a stranger might sign: any JSON with a right checksum."""
    text = json.dumps(body).encode()[:-1]
    return text + b',\n"xxh3": "' + checksum(text).encode() + b'"}\n'


WRONG: dict[str, dict[str, Any]] = {
    "later version": {"version": 2},
    "other format": {"format": "zip"},
    "unknown key": {"extra": 1},
    "path in a file name": {"files": [{"name": "../../etc/passwd", "bytes": 124, "header_xxh3": ID}]},
    "negative size": {"files": [{"name": f"rank-00000-{ID}.safetensors", "bytes": -1, "header_xxh3": ID}]},
    "number as text": {"step": "3"},
    "step is true": {"step": True},
    "no list": {"tensors": []},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_signed_manifest_that_no_version_wrote_is_refused(what: str) -> None:
    body = {**json.loads(encode(manifest())), **WRONG[what]}
    del body["xxh3"]
    with pytest.raises(CheckpointError):
        decode(signed(body), where=HERE)


PIECES: dict[str, list[Piece]] = {
    "gap": [piece(0, 3), piece(4, 6)],
    "overlap": [piece(0, 4), piece(3, 6)],
    "too short": [piece(0, 5)],
    "too long": [piece(0, 7)],
    "empty": [piece(0, 0, digests=0), piece(0, 6)],
    "outside the file": [piece(0, 6, offset=101)],
    "no such file": [piece(0, 6, file=1)],
    "checksums missing": [piece(0, 6, digests=0)],
    "checksums too many": [piece(0, 6, digests=2)],
}


@pytest.mark.parametrize("what", PIECES)
def test_pieces_that_do_not_make_a_tensor_are_refused(what: str) -> None:
    record = TensorRecord(dtype="F32", shape=[2, 3], pieces=PIECES[what])
    with pytest.raises(CheckpointError, match=r"'value/w' has"):
        decode(encode(manifest(tensors={"value/w": record})), where=HERE)


def test_an_unknown_dtype_is_refused() -> None:
    record = TensorRecord(dtype="F4", shape=[2, 3], pieces=[piece(0, 6)])
    with pytest.raises(CheckpointError, match="F4"):
        decode(encode(manifest(tensors={"value/w": record})), where=HERE)


def test_a_shape_whose_product_is_absurd_is_refused_before_memory_is_asked_for() -> None:
    record = TensorRecord(dtype="F32", shape=[2**40, 2**20], pieces=[piece(0, 6)])
    with pytest.raises(CheckpointError, match="of which 6 are there"):
        decode(encode(manifest(tensors={"value/w": record})), where=HERE)


def test_the_schema_in_the_documents_is_the_one_in_use() -> None:
    made = subprocess.run([sys.executable, DOCS / "manifest_schema.py"], capture_output=True, text=True, timeout=60)
    assert made.stdout == (DOCS / "manifest.schema.json").read_text(), (
        "run `python docs/manifest_schema.py > docs/manifest.schema.json`"
    )
