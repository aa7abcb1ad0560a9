"""The reader of torch.save's files gives what was saved, runs nothing, and costs no more than the file does."""

from __future__ import annotations

import copyreg
import enum
import io
import os
import pickle
import pickletools
import shutil
import sys
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import Tensor

from torch_zip import STORAGE, records_of, rewrite, tensor_pickle, write_zip
from zerolith.checkpoint.deepspeed import StoredTensor, Symbol, Unknown, read_torch_file, unpickle
from zerolith.checkpoint.deepspeed.archive import MAX_DIRECTORY_BYTES, open_archive
from zerolith.checkpoint.deepspeed.plain import as_json, load_tensors, meaning
from zerolith.errors import CheckpointDamagedError, CheckpointError

PROTOCOLS = (2, 3, 4, 5)


def read(path: Path) -> Any:
    """The file with its tensors in memory."""
    return load_tensors(read_torch_file(path), where=path)


def outcome(path: Path) -> tuple[Any, str]:
    """The value, which can be written as JSON; or the message of the error."""
    try:
        as_json(read_torch_file(path))
        return read(path), ""
    except CheckpointError as error:
        return None, str(error)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, types and bits included; a torch.Size is a tuple."""
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right) if isinstance(left, float) else left == right


# --- what was saved is what is read -----------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
MORE_DTYPES = (torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.int8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and shape; whole, transposed, cut from a larger one, or expanded."""
    dtype = draw(st.sampled_from(DTYPES + MORE_DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numel = torch.Size(shape).numel()
    raw = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=numel, max_size=numel)), dtype=torch.float32)
    whole = raw.to(dtype).view(shape)
    how = draw(st.sampled_from(("whole", "transposed", "cut", "expanded", "parameter")))
    if how == "transposed" and len(shape) > 1:
        return whole.transpose(0, -1)
    if how == "cut" and shape and shape[0] > 1:
        return whole[1:]
    if how == "expanded":
        return whole.unsqueeze(0).expand(3, *shape)
    return torch.nn.Parameter(whole, requires_grad=False) if how == "parameter" else whole


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
)
KEYS = st.text(max_size=5) | st.integers() | st.tuples(st.integers(), st.text(max_size=3))
VALUES = st.recursive(
    SCALARS | tensors() | st.complex_numbers(allow_nan=False) | st.sets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=VALUES, protocol=st.sampled_from(PROTOCOLS))
@example(value=torch.zeros(3, 0)[1:], protocol=2)
@example(value={"": [(), frozenset({1}), bytearray(b"a"), 1j, torch.Size([1, 2])]}, protocol=2)
def test_what_torch_saves_is_read(value: Any, protocol: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "value.pt"
    torch.save(value, path, pickle_protocol=protocol)
    assert same(read(path), value)
    open_archive(path).verify()


def test_tensors_that_are_one_are_read_as_one(tmp_path: Path) -> None:
    weight = torch.randn(4)
    torch.save({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "tied.pt")
    found = read(tmp_path / "tied.pt")
    assert found["a"] is found["b"]
    assert found["c"].tolist() == weight[1:].tolist()


def test_what_is_read_is_memory_of_its_own(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "zeros.pt")
    read(tmp_path / "zeros.pt").fill_(1)
    assert read(tmp_path / "zeros.pt").tolist() == [0, 0, 0]


def test_tensors_with_attributes_are_plain_tensors(tmp_path: Path) -> None:
    tensor, parameter = torch.arange(3.0), torch.nn.Parameter(torch.arange(2.0))
    tensor.ds_id = parameter.note = 7
    torch.save([tensor, parameter], tmp_path / "noted.pt")
    assert [each.tolist() for each in read(tmp_path / "noted.pt")] == [[0, 1, 2], [0, 1]]


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.arange(5), tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read(tmp_path / "unchecked.pt").tolist() == [0, 1, 2, 3, 4]
    open_archive(tmp_path / "unchecked.pt").verify()


class Stage(enum.IntEnum):
    TWO = 2

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As Python itself does it, but for 3.11.0 to 3.11.3."""
        return type(self), (self.value,)


class Scaler:
    def __init__(self) -> None:
        self.cur_scale = 128.0


def test_objects_of_classes_are_records_that_can_be_looked_into(tmp_path: Path) -> None:
    kinds = {"stage": Stage.TWO, "scaler": Scaler(), "lists": defaultdict(list, {1: [2]}), "counts": Counter("aab")}
    torch.save(kinds, tmp_path / "objects.pt")
    found = read_torch_file(tmp_path / "objects.pt")
    assert isinstance(found["stage"], Unknown)
    assert found["stage"].callee == Symbol(__name__, "Stage")
    assert found["stage"].args == (2,)
    assert found["scaler"].state == {"cur_scale": 128.0}
    assert found["lists"] == {1: [2]}
    assert found["counts"] == {"a": 2, "b": 1}
    assert as_json(found) == {
        "stage": 2, "scaler": f"<{__name__}.Scaler>", "lists": {"1": [2]}, "counts": {"a": 2, "b": 1},
    }  # fmt: skip


class ZeroStageEnum(enum.IntEnum):
    gradients = 2

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As Python 3.11.0 to 3.11.3 do it."""
        return getattr, (type(self), self.name)


class Colour(enum.IntEnum):
    RED = 7
    __reduce_ex__ = ZeroStageEnum.__reduce_ex__


def test_members_of_enums_that_were_pickled_by_name(tmp_path: Path) -> None:
    torch.save({"stage": ZeroStageEnum.gradients, "colour": Colour.RED}, tmp_path / "enums.pt")
    found = read_torch_file(tmp_path / "enums.pt")
    assert meaning(found["stage"]) == 2
    assert as_json(found) == {"stage": 2, "colour": "RED"}


# --- nothing runs -----------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is not there; a module `canary_module` whose import makes it; and a name for it in a pickle."""
    (tmp_path / "canary_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()
    assert "canary_module" not in sys.modules


class Evil:
    """Pickled, it is a call."""

    def __init__(self, callee: Callable[..., Any], *args: Any) -> None:
        self.reduced = (callee, args)

    def __reduce__(self) -> Any:
        return self.reduced


def hand_made(command: bytes) -> dict[str, bytes]:
    """Pickles that run `touch canary` when they are loaded, by the opcode that does it."""
    text = b"X" + len(command).to_bytes(4, "little") + command
    string = b"S'" + command + b"'\n"
    system = b"cposix\nsystem\n"
    return {
        "REDUCE": system + b"(" + text + b"tR.",
        "REDUCE of protocol 0": system + b"(" + string + b"tR.",
        "INST": b"(" + string + b"iposix\nsystem\n.",
        "OBJ": b"(" + system + string + b"o.",
        "NEWOBJ": b"\x80\x02" + system + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + text + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "EXT1": b"\x80\x02\x82\xf0" + text + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + text + b"\x85R.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\x00\x00\x00ostR.",
        "BUILD": b"cbuiltins\nobject\n)\x81}X\x0c\x00\x00\x00__setstate__" + system + b"sb" + text + b"b.",
        "a module": b"ccanary_module\nanything\n.",
        "a module's call": b"ccanary_module\nanything\n)R.",
        "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x10__import__.x.y.z\x93" + text + b"\x85R.",
        "inside a tensor": tensor_pickle(elements=2, arguments=b"K\x00" + system + text + b"\x85RK\x01\x85"),
        "as a key": b"}" + system + text + b"\x85RK\x01s.",
        "as a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"ctorch\nTensor\n" + text + b"\x85NtR.",
    }


@pytest.mark.parametrize("how", hand_made(b""))
def test_nothing_runs(how: str, canary: Path, tmp_path: Path) -> None:
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        pickled = hand_made(f"touch {canary}".encode())[how]
        path = write_zip(tmp_path / "evil.pt", pickled, {"data/0": bytes(8)})
        found, error = outcome(path)
        assert str(path) in error or isinstance(found, Unknown | Symbol | dict)
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_that_reduce_to_calls_are_inert(protocol: int, canary: Path, tmp_path: Path) -> None:
    command = f"touch {canary}"
    evil = [
        Evil(os.system, command),
        Evil(eval, f"open({str(canary)!r}, 'w')"),
        Evil(exec, f"open({str(canary)!r}, 'w')"),
        Evil(open, str(canary), "w"),
        Evil(torch.load, str(canary)),
        Evil(shutil.copy, __file__, str(canary)),
        Evil(os.makedirs, str(canary)),
    ]
    torch.save(evil, tmp_path / "evil.pt", pickle_protocol=protocol)
    found = read_torch_file(tmp_path / "evil.pt")
    assert all(isinstance(each, Unknown) for each in found)
    assert found[0].callee.name == "system"
    assert found[0].args == (command,)


@pytest.mark.parametrize("how", ["REDUCE", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1"])
def test_the_pickles_of_these_tests_would_run(how: str, tmp_path: Path) -> None:
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        if how.startswith("NEWOBJ"):  # calls a class only, so anything but a class is refused
            with pytest.raises((TypeError, pickle.UnpicklingError, AttributeError)):
                pickle.loads(hand_made(b"true")[how])
        else:
            pickle.loads(hand_made(f"touch {tmp_path / 'here'}".encode())[how])
            assert (tmp_path / "here").exists()
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)


# --- files that are no files of torch.save ----------------------------------------------------------

LAUGHS = b"(K\x01K\x02t" + b"2\x86" * 60 + b"."  # each pair holds the one before twice
LOOP = b"]q\x00h\x00a."
LOOP_IN_OBJECT = b"cbuiltins\nobject\n)\x81q\x00h\x00b."
DEEP = b"]" * 20_000 + b"a" * 19_999 + b"."
QUADRATIC = (
    b"\x80\x02ccollections\nOrderedDict\nq\x01]q\x00("
    + b"K\x01K\x02\x86" * 9999
    + b"e0("
    + b"h\x01h\x00\x85R" * 9999
    + b"l."
)
BOMBS = {
    "shared twice, sixty times": LAUGHS,
    "shared twice as a key": b"}" + LAUGHS[:-1] + b"K\x01s.",
    "shared twice in a set": b"\x80\x04\x8f(" + LAUGHS[:-1] + b"\x90.",
    "shared twice as a storage": b"(X\x07\x00\x00\x00storage" + LAUGHS[:-1] + b"K\x00K\x00K\x00tQ.",
    "a list in itself": LOOP,
    "an object that is its own state": LOOP_IN_OBJECT,
    "twenty thousand lists in lists": DEEP,
    "a list copied ten thousand times": QUADRATIC,
    "a text of 2**62 bytes": b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x40x.",
    "bytes of 2**62 bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40x.",
    "a number of 2**31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "a number of a million bits": b"\x80\x02\x8b\x00\x00\x02\x00" + b"\x7f" * 2**17 + b".",
    "a number of a million digits": b"L" + b"7" * 10**6 + b"L\n.",
    "nothing": b"",
    "no value": b".",
    "two values": b"NN.",
    "an open mark": b"(.",
    "no end": b"N",
    "a memo that is not there": b"h\x07.",
    "a mark that is not there": b"t.",
    "a list as a key": b"}]Ns.",
    "a dict with half an entry": b"}(Nu.",
    "elements for a number": b"K\x01Na.",
    "a state for a number": b"K\x01Nb.",
    "a persistent id in text": b"Px\n.",
    "a buffer from outside": b"\x80\x05\x97.",
    "an unknown opcode": b"\xff.",
    "a text that is none": b"X\x01\x00\x00\x00\xff.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_harmful_pickles_are_refused_soon_and_in_little_memory(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpickle, "MAX_UNITS", unpickle.MAX_UNITS // 10)
    path = write_zip(tmp_path / "bomb.pt", BOMBS[what])
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(CheckpointDamagedError, match=r"bomb\.pt.*data\.pkl"):
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2**27 + 4096 * len(BOMBS[what])
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 60


SIZES = {
    "an offset outside": b"K\x09K\x01\x85K\x01\x85",
    "sizes outside": b"K\x00K\x09\x85K\x01\x85",
    "a stride outside": b"K\x00K\x02\x85K\x09\x85",
    "the last element outside": b"K\x01K\x08\x85K\x01\x85",
    "a negative offset": b"J\xff\xff\xff\xffK\x01\x85K\x01\x85",
    "a negative size": b"K\x00J\xff\xff\xff\xff\x85K\x01\x85",
    "a negative stride": b"K\x07K\x02\x85J\xff\xff\xff\xff\x85",
    "two sizes and one stride": b"K\x00K\x02K\x02\x86K\x01\x85",
    "a size that is a text": b"K\x00X\x01\x00\x00\x00a\x85K\x01\x85",
    "a size that is a bool": b"K\x00\x88\x85K\x01\x85",
    "sizes in a list": b"K\x00](K\x01e](K\x01e",
    "a huge size": b"K\x00\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00\x85K\x01\x85",
    "a size that overflows": b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85K\x00\x85",
    "a billion times one element": b"K\x00J\x00\x00\x00\x40\x85K\x00\x85",
    "no elements, of sizes that overflow": b"K\x00K\x00\x8a\x08" + b"\xff" * 7 + b"\x7fK\x09\x87K\x01K\x01K\x01\x87",
    "ninety dimensions": b"K\x00(" + b"K\x01" * 90 + b"t(" + b"K\x01" * 90 + b"t",
}


@pytest.mark.parametrize("what", SIZES)
def test_tensors_that_reach_outside_their_storage_are_refused(what: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "sizes.pt", tensor_pickle(elements=8, arguments=SIZES[what]), {"data/0": bytes(32)})
    with pytest.raises(CheckpointDamagedError, match=r"sizes\.pt.*data/0"):
        read_torch_file(path)


def test_strides_of_dimensions_of_one_element_may_be_anything(tmp_path: Path) -> None:
    arguments = b"K\x01K\x01K\x02\x86\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x02\x86"
    data = torch.arange(8.0).numpy().tobytes()
    path = write_zip(tmp_path / "odd.pt", tensor_pickle(elements=8, arguments=arguments), {"data/0": data})
    assert read(path).tolist() == [[1, 3]]


def test_a_storage_that_is_missing_or_short_is_named(tmp_path: Path) -> None:
    pickled = tensor_pickle(elements=8, arguments=b"K\x00K\x02\x85K\x01\x85")
    with pytest.raises(CheckpointDamagedError, match=r"x\.pt.*data/0.*not there"):
        read_torch_file(write_zip(tmp_path / "x.pt", pickled))
    with pytest.raises(CheckpointDamagedError, match=r"x\.pt.*data/0.*28 bytes for 8"):
        read_torch_file(write_zip(tmp_path / "x.pt", pickled, {"data/0": bytes(28)}))


@pytest.mark.parametrize("numel", [b"J\xff\xff\xff\xff", b"\x8a\x0a" + b"\x7f" * 10, b"N", b"\x88", b"]"])
def test_absurd_storages_are_refused(numel: bytes, tmp_path: Path) -> None:
    pickled = STORAGE.partition(b"K%c")[0] + numel + b"tQ."
    with pytest.raises(CheckpointDamagedError, match="data/0"):
        read_torch_file(write_zip(tmp_path / "x.pt", pickled, {"data/0": bytes(4)}))


def test_tensors_many_times_the_size_of_the_file_are_not_loaded(tmp_path: Path) -> None:
    whole = torch.zeros(2**18)
    torch.save([whole[start:] for start in range(64)], tmp_path / "views.pt")
    with pytest.raises(CheckpointDamagedError, match=r"views\.pt.*larger"):
        read(tmp_path / "views.pt")


def test_bytes_that_are_no_bools_become_true(tmp_path: Path) -> None:
    torch.save(torch.tensor([True, False, True]), tmp_path / "bools.pt")
    rewrite(tmp_path / "bools.pt", {**records_of(tmp_path / "bools.pt"), "data/0": b"\xff\x00\x02"})
    assert read(tmp_path / "bools.pt").view(torch.uint8).tolist() == [1, 0, 1]


def saved_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(40.0), "b": [1, "two"]}, file)
    return file.getvalue()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = saved_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointDamagedError, match=r"cut\.pt"):
            read_torch_file(path)


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read_whole_and_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save(torch.arange(1000.0), path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0)[500:].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    stored = read_torch_file(path)
    assert isinstance(stored, StoredTensor)
    with pytest.raises(CheckpointDamagedError, match=r"flipped\.pt.*data/0.*checksum"):
        stored.load()
    with pytest.raises(CheckpointDamagedError, match=r"flipped\.pt.*data/0.*checksum"):
        open_archive(path).verify()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    torch.save(torch.arange(1000.0), tmp_path / "a.pt")
    stored = read_torch_file(tmp_path / "a.pt")
    torch.save(torch.arange(2000.0), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt.*changed"):
        stored.load()
    (tmp_path / "a.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"a\.pt.*not there"):
        stored.load()


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "small.pt", b"N.", {"data/0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointDamagedError, match=r"small\.pt.*compressed"):
        read_torch_file(path)


def test_entries_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "twice.pt", b"N.", {"data/0": b"a", "data/1": b"b"})
    path.write_bytes(path.read_bytes().replace(b"data/1", b"data/0"))
    with pytest.raises(CheckpointDamagedError, match=r"twice\.pt.*twice"):
        read_torch_file(tmp_path / "twice.pt")


def test_a_huge_directory_is_not_read(tmp_path: Path) -> None:
    size = 2 * MAX_DIRECTORY_BYTES
    with open(tmp_path / "wide.pt", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        end = b"PK\5\6" + bytes(4) + b"\xff\x00\xff\x00" + size.to_bytes(4, "little") + bytes(6)
        file.write(end)
    with pytest.raises(CheckpointDamagedError, match=r"wide\.pt"):
        read_torch_file(tmp_path / "wide.pt")


def test_the_old_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt.*before 1\.6.*checkpoint_serialization"):
        read_torch_file(tmp_path / "old.pt")


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "big.pt", b"N.", {"byteorder": b"big" if sys.byteorder == "little" else b"little"})
    with pytest.raises(CheckpointError, match=r"big\.pt.*byte order"):
        read_torch_file(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "."):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_torch_file(tmp_path / name)
    with pytest.raises(CheckpointDamagedError, match="not there"):
        read_torch_file(tmp_path / "absent.pt")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_pickle_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes of a real pickle replaced by others, opcodes mostly, and the checksum made right."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    torch.save({"a": torch.zeros(3), "b": [1, {"c": (2.5, Stage.TWO)}], "d": Scaler()}, path)
    records = records_of(path)
    pickled = bytearray(records["data.pkl"])
    codes = st.sampled_from([ord(opcode.code) for opcode in pickletools.opcodes]) | st.integers(0, 255)
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(codes)
    rewrite(path, {**records, "data.pkl": bytes(pickled)})
    _, error = outcome(path)
    assert not error or str(path) in error
