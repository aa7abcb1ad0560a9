"""The documented format is enough: a reader written from docs/checkpoint-format.md alone gives what the engine has."""

from __future__ import annotations

import ast
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor, nn

from checkpoint.independent_reader import Checkpoint, CheckpointError, open_checkpoint
from harness import run_ranks
from models import make_gpt, my_pieces, start_engine, token_batches, zero_config
from zerolith.zero import safe_get_full_fp32_param, safe_get_full_optimizer_state

READER = Path(__file__).with_name("independent_reader.py")
BF16 = {"bf16": {"enabled": True}}
STEPS = 2
STATES = ("exp_avg", "exp_avg_sq")
TENSORS = {
    "bf16": (torch.arange(7) / 3).bfloat16().view(7, 1),
    "i64": torch.arange(300_000).view(3, -1) - 2**40,  # several chunks
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "empty": torch.zeros(0, 3),
    "complex": torch.tensor([1 + 2j, -0.0j]),
    "flat": torch.tensor(-1 / 3),
    "flat_bf16": torch.tensor(1 / 3).bfloat16(),
    "flat_i64": torch.tensor(-(2**63)),
    "flat_bool": torch.tensor(True),
    "flat_nan": torch.tensor(math.nan),
}
CLIENT_STATE: dict[str, Any] = {
    "nested": {"list": [1, 2.5, None, {"deeper": True}], "empty": {}, "$odd": [], "text": 'é😀\n"\\\0'},
    "tuple": (1, ("a", [2]), ()),
    "floats": [math.nan, math.inf, -math.inf, -0.0, 0.1, 5e-324],
    "big": 2**70,
    "keys": {1: "int", "1": "str", None: {2: 3}, (1, "x"): [], -0.5: True},
    "dollar": {"$tuple": [1]},
    "counter": Counter("abracadabra"),
    "counts of tuples": Counter({(1, 2): 3, 4: -5}),
    "tensors": TENSORS,
    "in a list": [(torch.arange(3),), {7: torch.ones(2)}],
}


class Saved(NamedTuple):
    """A job's folder and what its engine had."""

    folder: Path
    world: int
    values: dict[str, Tensor]  # by the names of the checkpoint


def save(folder: Path, stage: int, precision: dict[str, Any]) -> dict[str, Tensor]:
    engine = start_engine(make_gpt(), zero_config(stage, **precision))
    for batch in token_batches(STEPS, 4 * engine.world_size):
        for piece in my_pieces(batch, engine):
            engine.backward(engine(piece))
            engine.step()
    engine.save_checkpoint(folder, client_state=CLIENT_STATE)
    values = {}
    for name, param in engine.module.named_parameters():
        values[f"value/{name}"] = safe_get_full_fp32_param(param).clone()
        for key in STATES:
            values[f"optimizer/{key}/{name}"] = safe_get_full_optimizer_state(param, key).clone()
    engine.destroy()
    return values


@pytest.fixture(
    scope="module",
    params=[(world, stage, precision) for world in (1, 2) for stage in (0, 3) for precision in ("fp32", "bf16")],
    ids=lambda case: f"{case[0]}-ranks-stage-{case[1]}-{case[2]}",
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    world, stage, precision = request.param
    folder = tmp_path_factory.mktemp("job")
    values = run_ranks(world, save, folder, stage, BF16 if precision == "bf16" else {})[0]
    return Saved(folder, world, values)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, save, folder, 3, BF16)
    return folder


@pytest.fixture
def job(two_ranks: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(two_ranks, tmp_path / "job")


def test_tensors_are_the_engines_bit_for_bit(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved.folder)
    checkpoint.verify()
    names = [name for name in checkpoint.names() if name.startswith(("value/", "optimizer/"))]
    assert sorted(names) == sorted(saved.values)
    for name, value in saved.values.items():
        assert same_bits(checkpoint.tensor(name), value), name
    pieces = [len(tensor["pieces"]) for tensor in checkpoint.manifest["tensors"].values()]
    assert max(pieces) == saved.world, "or assembling is not tried"


def test_parameters_and_counters_are_described(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved.folder)
    for name, weight in make_gpt().named_parameters():
        described = checkpoint.parameter(name)
        assert (described["shape"], described["trained"]) == (list(weight.shape), True)
        assert described["aliases"] == (["head.weight"] if name == "embed.weight" else [])
        assert same(described["optimizer"], {"step": torch.tensor(float(STEPS))})
    assert checkpoint.state("counters")["global_steps"] == checkpoint.manifest["step"] == STEPS
    assert len(checkpoint.state("ranks")) == checkpoint.manifest["num_ranks"] == saved.world
    for rank, state in enumerate(checkpoint.state("ranks")):
        assert same_bits(state["rng"]["torch"], checkpoint.tensor(f"rank/{rank}/rng/torch"))


def test_client_state_comes_back(saved: Saved) -> None:
    checkpoint = open_checkpoint(saved.folder)
    assert same(checkpoint.state("client"), CLIENT_STATE)
    assert 2**20 == checkpoint.manifest["chunk_bytes"] < TENSORS["i64"].nbytes, "or several chunks are not tried"


class WithBuffers(nn.Module):
    """Normalised, partly frozen and with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.frozen = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.frozen(self.layer(self.norm(x))) * self.gain).square().mean()

    def get_extra_state(self) -> Any:
        return {"seen": (torch.arange(3), 4)}


def save_within_accumulation(folder: Path, stage: int, exclude_frozen: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    engine = start_engine(WithBuffers(), zero_config(stage, gradient_accumulation_steps=2))
    torch.manual_seed(engine.global_rank)
    engine.backward(engine(torch.randn(4, 8)))
    engine.step()
    engine.save_checkpoint(folder, exclude_frozen_parameters=exclude_frozen)
    return dict(engine.module.named_buffers())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_other_tensors_are_there(stage: int, tmp_path: Path) -> None:
    buffers = run_ranks(2, save_within_accumulation, tmp_path, stage, stage == 0)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.verify()
    for name, value in buffers[0].items():
        assert same_bits(checkpoint.tensor(f"buffer/{name}"), value)
        of_rank_1 = f"rank/1/buffer/{name}"
        assert (of_rank_1 in checkpoint.names()) == (not torch.equal(buffers[1][name], value))
        assert of_rank_1 not in checkpoint.names() or same_bits(checkpoint.tensor(of_rank_1), buffers[1][name])
    assert "rank/1/buffer/norm.running_mean" in checkpoint.names()
    assert checkpoint.tensor("value/gain").shape == ()
    assert ("value/frozen.weight" in checkpoint.names()) == (stage == 3)
    assert checkpoint.parameter("frozen.weight")["trained"] is False
    gradients = {name for name in checkpoint.names() if name.endswith("gradient/layer.weight")}
    reduced = {"gradient/layer.weight"}
    assert gradients == (reduced if stage == 3 else {f"rank/{rank}/gradient/layer.weight" for rank in (0, 1)})
    assert same(checkpoint.state("extra_state"), {"": {"seen": (torch.arange(3), 4)}})


def test_every_flipped_byte_is_noticed(job: Path) -> None:
    checkpoint = open_checkpoint(job)
    for path in [job / "latest", checkpoint.folder / "manifest.json", *data_files(checkpoint)]:
        for position in positions(checkpoint, path):
            flip_bit(path, position)
            assert is_refused(job), f"byte {position} of {path.name}"
            flip_bit(path, position)
    open_checkpoint(job).verify()


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ (1 << position % 8)]))


def positions(checkpoint: Checkpoint, path: Path) -> list[int]:
    """All of a small file; of a larger one both ends of every region and some bytes within."""
    size = path.stat().st_size
    if size < 100:
        return list(range(size))
    if path.name == "manifest.json":
        return [*range(0, size, size // 100), *range(size - 40, size)]
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    chosen = {*range(100), *range(100, begin, begin // 30), *range(begin - 10, begin), size - 1}
    chunk = checkpoint.manifest["chunk_bytes"]
    for start, stop in regions(checkpoint, path):
        chosen |= {start, (start + stop) // 2, stop - 1}
        for boundary in range(start + chunk, stop, chunk):
            chosen |= {boundary - 1, boundary}
    return sorted(chosen)


def regions(checkpoint: Checkpoint, path: Path) -> Iterator[tuple[int, int]]:
    """Where the tensors lie, as the safetensors header says."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:begin]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield begin + start, begin + stop


def test_files_that_are_shorter_longer_or_gone_are_noticed(job: Path) -> None:
    checkpoint = open_checkpoint(job)
    for path in [job / "latest", checkpoint.folder / "manifest.json", *data_files(checkpoint)]:
        content = path.read_bytes()
        for damaged in (b"", content[:-1], content + b"\n", content + content):
            path.write_bytes(damaged)
            assert is_refused(job), f"{len(damaged)} bytes of {path.name}"
        path.unlink()
        assert is_refused(job), f"no {path.name}"
        path.write_bytes(content)
    open_checkpoint(job).verify()


def test_a_data_file_of_another_checkpoint_is_noticed(job: Path, tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path / "other", 3, BF16)
    ours, theirs = open_checkpoint(job), open_checkpoint(tmp_path / "other")
    mine, other = data_files(ours)[0], data_files(theirs)[0]
    assert mine.stat().st_size == other.stat().st_size, "or the size gives it away"
    shutil.copy(other, mine)
    assert is_refused(job)
    rewrite_manifest(
        ours.folder, lambda m: m["files"][0].update(header_xxh3=theirs.manifest["files"][0]["header_xxh3"])
    )
    with pytest.raises(CheckpointError, match="another checkpoint"):
        open_checkpoint(job)


def test_a_folder_is_a_checkpoint_if_it_has_a_manifest(job: Path) -> None:
    tag = open_checkpoint(job).folder
    assert open_checkpoint(tag).manifest == open_checkpoint(job).manifest
    (tag / "rank-00000-0123456789abcdef.safetensors").write_bytes(b"of a save that died")
    (tag / "manifest.json.new").write_bytes(b"{")
    open_checkpoint(job).verify()
    (tag / "manifest.json").unlink()
    assert is_refused(job)
    assert is_refused(tag)


@pytest.mark.parametrize("tag", ["", ".", "..", ".zerolith.lock", "../job/global_step2", "nowhere"])
def test_latest_names_a_folder_beside_it(tag: str, job: Path) -> None:
    (job / "latest").write_text(f"{tag}\n{xxhash.xxh3_64_hexdigest(tag.encode())}\n")
    assert is_refused(job)


@pytest.mark.parametrize("which", ["latest", "global_step2", "manifest.json", "a data file"])
def test_symbolic_links_are_not_followed(which: str, job: Path) -> None:
    tag = open_checkpoint(job).folder
    links = {"manifest.json": tag / which, "a data file": data_files(open_checkpoint(job))[1]}
    link = links.get(which, job / which)
    link.symlink_to(link.rename(job.parent / "elsewhere"))
    assert is_refused(job)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda m: m.update(encrypted=False),
    "an unknown key of a file": lambda m: m["files"][0].update(compressed=True),
    "an unknown key of a tensor": lambda m: m["tensors"]["value/norm.weight"].update(layout="blocked"),
    "an unknown key of a piece": lambda m: m["tensors"]["value/norm.weight"]["pieces"][0].update(stride=2),
    "an unknown key of a parameter": lambda m: m["parameters"]["norm.weight"].update(scale=2),
    "an unknown key of state": lambda m: m["state"].update(more=None),
    "an unknown object": lambda m: m["state"]["client"].update(x={"$set": [1]}),
    "a missing key": lambda m: m.pop("step"),
    "a later version": lambda m: m.update(version=2),
    "another format": lambda m: m.update(format="checkpoint"),
    "another id": lambda m: m.update(id="0123456789abcdef"),
    "an unknown dtype": lambda m: m["tensors"]["value/norm.weight"].update(dtype="F4"),
    "another shape": lambda m: m["tensors"]["value/norm.weight"].update(shape=[31]),
    "another shape of as many elements": lambda m: m["tensors"]["value/norm.weight"].update(shape=[4, 8]),
    "a piece too few": lambda m: m["tensors"]["value/embed.weight"]["pieces"].pop(),
    "pieces in another order": lambda m: m["tensors"]["value/embed.weight"]["pieces"].reverse(),
    "a checksum too few": lambda m: m["tensors"]["client_state/tensors/i64"]["pieces"][0]["xxh3"].pop(),
    "another place": lambda m: m["tensors"]["value/norm.weight"]["pieces"][0].update(offset=8),
    "a file that is not listed": lambda m: m["tensors"]["value/norm.weight"]["pieces"][0].update(file=2),
    "a file elsewhere": lambda m: m["files"][0].update(name="../global_step2/" + m["files"][0]["name"]),
    "bytes of no tensor": lambda m: m["tensors"].pop("value/norm.weight"),
    "a reference to nothing": lambda m: m["state"]["client"].update(x={"$tensor": "client_state/x"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_no_reader_may_accept_is_refused(change: Callable[[dict[str, Any]], Any], job: Path) -> None:
    tag = open_checkpoint(job).folder
    rewrite_manifest(tag, lambda manifest: None)
    open_checkpoint(job).verify()
    rewrite_manifest(tag, change)
    assert is_refused(job)


def test_the_reader_is_short_and_independent() -> None:
    source = READER.read_text()
    assert len(source.splitlines()) < 200
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(str(node.module).partition(".")[0])
    assert modules - sys.stdlib_module_names == {"numpy", "xxhash"}
    assert not {"importlib", "pickle", "runpy"} & modules
    assert "__import__" not in source


def data_files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.folder / file["name"] for file in checkpoint.manifest["files"]]


def is_refused(folder: Path) -> bool:
    try:
        open_checkpoint(folder).verify()
    except CheckpointError:
        return True
    return False


def rewrite_manifest(tag: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a manifest says and give it the right checksum again."""
    manifest = json.loads((tag / "manifest.json").read_bytes())
    del manifest["xxh3"]
    change(manifest)
    body = json.dumps(manifest).encode()[:-1]
    (tag / "manifest.json").write_bytes(body + b',\n"xxh3": "%b"}\n' % xxhash.xxh3_64_hexdigest(body).encode())


def same_bits(got: Any, expected: Any) -> bool:
    """Whether an array holds a tensor's bits; bfloat16 comes widened to float32."""
    if isinstance(expected, Tensor):
        expected = (expected.float() if expected.dtype is torch.bfloat16 else expected).contiguous().numpy()
    return (got.dtype, got.shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def same(got: Any, expected: Any) -> bool:
    """Equal in types, order, bits and signs."""
    if isinstance(expected, Tensor):
        return isinstance(got, np.ndarray) and same_bits(got, expected)
    if type(got) is not type(expected):
        return False
    if isinstance(expected, dict):
        return same([*got.items()], [*expected.items()])
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same, got, expected))
    return repr(got) == repr(expected)
