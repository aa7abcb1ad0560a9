"""A checkpoint's weights as files that others open: bit for bit, whole or not at all, in little memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt
from saved_runs import BF16, FP32, Truth, flip, same, train_and_save, tree
from zerolith.checkpoint import Reader, export, get_fp32_state_dict, load_model
from zerolith.checkpoint.disk import Disk
from zerolith.errors import CheckpointDamagedError, CheckpointError, UsageError


def exported(target: Path) -> dict[str, Tensor]:
    """All tensors, as Hugging Face's loader finds them."""
    index = target / "model.safetensors.index.json"
    if not index.exists():
        return load_file(target / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(target / file) for file in set(places.values())}
    assert sorted(places) == sorted(name for file in files.values() for name in file)
    return {name: files[file][name] for name, file in places.items()}


@pytest.mark.parametrize("precision", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_every_stage_gives_its_masters_and_its_weights(
    stage: int, world: int, precision: dict[str, Any], tmp_path: Path
) -> None:
    masters, weights = run_ranks(world, train_and_save, tmp_path / "job", stage, precision)[0]
    state = get_fp32_state_dict(tmp_path / "job")
    assert state.pop("head.weight") is state["embed.weight"]
    same(state, masters)

    model = make_gpt(seed=7).to(next(iter(weights.values())).dtype)
    assert load_model(model, tmp_path / "job") == ([], [])
    same({name: param.detach() for name, param in model.named_parameters()}, weights)

    dtype = "bf16" if precision else "fp32"
    export(tmp_path / "job", tmp_path / "hf", dtype=dtype)
    same(exported(tmp_path / "hf"), weights)
    export(tmp_path / "job", tmp_path / "hf", dtype="saved", max_shard_bytes=20_000, overwrite=True)
    same(exported(tmp_path / "hf"), masters)


def test_the_checkpoint_s_own_files_open_elsewhere(saved: tuple[Path, Truth]) -> None:
    home = saved[0] / "global_step2"
    with Reader(home) as reader:
        found = {}
        for path in sorted(home.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    found[key] = file.get_tensor(key)
        for name, record in reader.manifest.tensors.items():
            whole = reader.tensor(name)
            if len(record.pieces) == 1:
                assert torch.equal(found.pop(name), whole)
                continue
            parts = [found.pop(f"{name}[{piece.start}:{piece.stop}]") for piece in record.pieces]
            assert torch.equal(torch.cat(parts).view(record.shape), whole)
    assert not found


def test_files_are_named_and_filled_as_hugging_face_does(odd: tuple[Path, Truth], tmp_path: Path) -> None:
    folder, truth = odd
    written = export(folder, tmp_path / "one")
    assert [path.name for path in written] == ["model.safetensors"]
    written = export(folder, tmp_path / "many", max_shard_bytes=200)
    names = [path.name for path in written]
    assert names == [f"model-{n:05d}-of-{len(names) - 1:05d}.safetensors" for n in range(1, len(names))] + [
        "model.safetensors.index.json"
    ]
    assert sorted(os.listdir(tmp_path / "many")) == sorted(names)
    tensors = exported(tmp_path / "many")
    same(tensors, exported(tmp_path / "one"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(each.nbytes for each in tensors.values())}
    for path in written[:-1]:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        sizes = [each.nbytes for each in load_file(path).values()]
        assert sum(sizes) <= 200 or len(sizes) == 1
    buffers = {"norm.running_mean": torch.bfloat16, "norm.num_batches_tracked": torch.int64, "bytes": torch.uint8}
    assert {name: tensors[name].dtype for name in buffers} == buffers
    assert "second.weight" not in tensors
    assert "passing" not in tensors
    same({name: tensors[name] for name in truth.weights}, truth.weights)


def test_frozen_parameters_can_be_left_out(odd: tuple[Path, Truth], tmp_path: Path) -> None:
    folder, truth = odd
    frozen = {"fixed.weight", "fixed.bias"}
    state = get_fp32_state_dict(folder, exclude_frozen_parameters=True)
    export(folder, tmp_path / "hf", exclude_frozen_parameters=True)
    assert truth.weights.keys() - state.keys() == frozen
    assert truth.weights.keys() - exported(tmp_path / "hf").keys() == frozen


# --- damage ------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_on_every_way_out(copied: Path, tmp_path: Path) -> None:
    flip(copied / "global_step2", "value/norm.bias")
    target = tmp_path / "hf"
    for call in (
        lambda: get_fp32_state_dict(copied),
        lambda: load_model(make_gpt(), copied),
        lambda: export(copied, target),
        lambda: export(copied, target, max_shard_bytes=1000),
    ):
        with pytest.raises(
            CheckpointDamagedError, match=r"tensor 'value/norm.bias' are not what was saved .their checksum is wrong"
        ):
            call()
        assert not target.exists()
    flip(copied / "global_step2", "value/norm.bias")
    flip(copied / "global_step2", "optimizer/exp_avg/norm.bias")
    export(copied, target)  # which needs no optimizer states


# --- the target ---------------------------------------------------------------------------------------


def test_a_target_that_holds_anything_is_left_alone(saved: tuple[Path, Truth], tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    export(saved[0], target)  # empty
    before = tree(target)
    with pytest.raises(CheckpointError, match="it is not empty"):
        export(saved[0], target, dtype="fp32")
    assert tree(target) == before
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="Not a directory"):
        export(saved[0], tmp_path / "file", overwrite=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="dangling"):
        export(saved[0], tmp_path / "dangling")


def test_overwriting_replaces_the_model_and_nothing_else(saved: tuple[Path, Truth], tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model-00001-of-00009.safetensors.new").write_text("of an export that died")
    export(saved[0], target, max_shard_bytes=20_000, overwrite=True)
    assert len(exported(target)) == len(saved[1].weights)
    export(saved[0], target, overwrite=True)
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    export(saved[0], target, max_shard_bytes=20_000, overwrite=True)
    assert "model.safetensors" not in os.listdir(target)
    same(exported(target), saved[1].weights)
    assert (target / "config.json").read_text() == "{}"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_the_earlier_one(
    saved: tuple[Path, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    export(saved[0], tmp_path / "hf", max_shard_bytes=20_000)
    before, write, count = tree(tmp_path / "hf"), Disk.write, 0

    def failing(self: Disk, file: int, data: memoryview) -> None:
        nonlocal count
        count += 1
        if count == 30:
            raise error
        write(self, file, data)

    monkeypatch.setattr(Disk, "write", failing)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        export(saved[0], tmp_path / "hf", dtype="fp32", max_shard_bytes=20_000, overwrite=True)
    assert tree(tmp_path / "hf") == before
    count = 0
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        export(saved[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_at_no_moment_does_an_index_lead_to_a_mixture(
    saved: tuple[Path, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every operation that changes names, what a reader finds is the old model, the new one, or none."""
    target = tmp_path / "hf"
    new = saved[1].weights
    for before, after in [(20_000, 20_000), (20_000, 10**9), (10**9, 20_000), (20_000, 30_000)]:
        shutil.rmtree(target, ignore_errors=True)
        export(saved[0], target, dtype="fp16", max_shard_bytes=before)
        old = exported(target)
        seen = []

        def look(name: str, old: dict[str, Tensor] = old, seen: list[str] = seen) -> Callable[..., Any]:
            usual = getattr(Disk, name)

            def call(self: Disk, *args: Any) -> Any:
                result = usual(self, *args)
                seen.append(found(target, old, new))
                return result

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink"):
                patch.setattr(Disk, name, look(name))
            export(saved[0], target, max_shard_bytes=after, overwrite=True)
        assert seen[-1] == "new"


def found(target: Path, old: dict[str, Tensor], new: dict[str, Tensor]) -> str:
    """As a loader has it: a single file wins, else the index leads."""
    single = target / "model.safetensors"
    if not single.exists() and not (target / "model.safetensors.index.json").exists():
        return "none"
    tensors = load_file(single) if single.exists() else exported(target)
    kinds = {"old" if value.dtype == torch.float16 else "new" for value in tensors.values()}
    assert len(kinds) == 1
    same(tensors, old if kinds == {"old"} else new)
    return kinds.pop()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int8"}, "choose among bf16, fp16, fp32, saved"), ({"max_shard_bytes": 0}, "must be positive")],
)
def test_wrong_options_are_refused(saved: tuple[Path, Truth], tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export(saved[0], tmp_path / "hf", **options)
    assert not (tmp_path / "hf").exists()


def test_a_number_that_would_become_infinite_is_no_export(tmp_path: Path) -> None:
    def save(value: float) -> None:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        zerolith.initialize(model=model, config=config)[0].save_checkpoint(tmp_path / "job", tag=str(value))

    for value in (7e4, float("inf")):
        run_ranks(1, save, value)
    with pytest.raises(CheckpointError, match=r"'weight' holds 70000, which does not fit torch.float16"):
        export(tmp_path / "job", tmp_path / "hf", "70000.0", dtype="fp16")
    export(tmp_path / "job", tmp_path / "hf", "70000.0", dtype="bf16")
    export(tmp_path / "job", tmp_path / "inf", "inf", dtype="fp16")
    assert bool(exported(tmp_path / "inf")["weight"].isinf().all())


# --- progress and memory ------------------------------------------------------------------------------


def test_progress_comes_to_the_whole(saved: tuple[Path, Truth], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(saved[0], tmp_path / "hf", tell=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (sum(each.nbytes for each in saved[1].masters.values()),) * 2


LARGE = 8192, 4096  # 128 MiB in fp32


def save_large(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.utils.skip_init(nn.Linear, *LARGE, bias=False))
    nn.init.constant_(model[1].weight, 1.5)
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    zerolith.initialize(model=model, config=config)[0].save_checkpoint(folder)


def peak_of(body: Callable[[], Any]) -> int:
    """Bytes by which the most that this process has held grows in `body`."""
    torch.ones(2**20).to(torch.bfloat16).isinf().any()  # what libraries touch when they first work is not ours
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    body()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_tensor_of_any_size_is_exported_and_loaded_in_the_memory_of_some_blocks(tmp_path: Path) -> None:
    run_ranks(1, save_large, tmp_path / "job")

    def exporting(dtype: str) -> int:
        return peak_of(lambda: export(tmp_path / "job", tmp_path / dtype, dtype=dtype))

    def loading(dtype: torch.dtype) -> int:
        model = nn.Sequential(nn.Linear(2, 2), nn.utils.skip_init(nn.Linear, *LARGE, bias=False)).to(dtype)
        nn.init.zeros_(model[1].weight)
        return peak_of(lambda: load_model(model, tmp_path / "job"))

    peaks = [run_ranks(1, exporting, dtype)[0] for dtype in ("bf16", "saved")]
    peaks += [run_ranks(1, loading, dtype)[0] for dtype in (torch.bfloat16, torch.float32)]
    assert max(peaks) < 64 * 2**20, peaks
