"""What save_checkpoint and load_checkpoint promise beside the bits: flags, names, messages, retention, async."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import make_gpt, token_batches, whole_weights, zero_config
from plain import STAGES, world_size
from zerolith.checkpoint import Disk
from zerolith.checkpoint.folder import Lock
from zerolith.errors import CheckpointError, CheckpointLockedError, UsageError

DATA = token_batches(6, 8)


def start(stage: int = 1, *, model: nn.Module | None = None, **more: Any) -> Any:
    config = zero_config(stage, train_micro_batch_size_per_gpu=8 // world_size(), **more)
    return zerolith.initialize(model=model or make_gpt(), config=config)[0]


def train(engine: Any, steps: int = 1) -> None:
    for batch in DATA[:steps]:
        engine.backward(engine(batch.chunk(world_size())[engine.global_rank]))
        engine.step()


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def tags(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


# --- what goes along ----------------------------------------------------------------------------


def test_client_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "epoch": 3,
        "best": float("-inf"),
        "loss": [1.5, float("nan"), None, True, "text", -(2**70)],
        "shape": (1, (2, [3])),
        "by number": {1: "one", (2, 3): "pair"},
        "$odd": {"$tensor": "not one"},
        "counts": Counter({"a": 2, 5: 1}),
        "ordered": OrderedDict(z=1, a=2),
        "ema": {"w/1": torch.arange(6.0).view(2, 3).t(), "w": torch.zeros(0, 3), "b": torch.ones(3, dtype=torch.bool)},
        "scalar": torch.tensor(1.1, dtype=torch.float64),
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    }
    engine = start()
    assert engine.save_checkpoint(tmp_path, client_state=state)
    path, loaded = engine.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step0")
    assert_alike(loaded, state)
    assert list(loaded["ordered"]) == ["z", "a"]
    assert type(loaded["counts"]) is Counter
    assert loaded["ema"]["w/1"].shape == (3, 2)


def assert_alike(one: Any, other: Any) -> None:
    """Equal in values and in types, NaN included; an OrderedDict may have become a dict."""
    assert type(one) is type(other) or {type(one), type(other)} == {dict, OrderedDict}
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_alike(*pair)
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (object, r"client_state\['a'\]\[1\]\['b'\] is a builtins.object"),
        (lambda: numpy.float32(1), r"numpy.float32.*\.item\(\)"),
        (lambda: {1, 2}, "builtins.set"),
        (lambda: torch.zeros(2).to_sparse(), "sparse"),
        (lambda: torch.float32, "torch.dtype"),
        (lambda: start, "function"),
        (lambda: "\ud800", "surrogate"),
        (lambda: {"\ud800": 1}, "surrogate"),
    ],
    ids=["object", "numpy", "set", "sparse", "dtype", "function", "text", "key"],
)
def test_what_a_checkpoint_cannot_hold_is_named_by_its_path(
    make: Callable[[], Any], where: str, tmp_path: Path
) -> None:
    engine = start()
    with pytest.raises(CheckpointError, match=where):
        engine.save_checkpoint(tmp_path, client_state={"a": [0, {"b": make()}]})
    assert tags(tmp_path) == []


def test_a_cycle_ends(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(CheckpointError, match="nested more than"):
        start().save_checkpoint(tmp_path, client_state={"a": cycle})


def test_one_rank_with_a_bad_state_stops_all(tmp_path: Path) -> None:
    def body() -> None:
        engine = start()
        state = {"a": object()} if engine.global_rank == 1 else {}
        with pytest.raises(CheckpointError, match="object"):
            engine.save_checkpoint(tmp_path, client_state=state)
        train(engine)
        assert engine.save_checkpoint(tmp_path)

    run_ranks(2, body)
    assert tags(tmp_path) == ["global_step1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_with_a_state_that_is_no_json_stops_all(rank: int, tmp_path: Path) -> None:
    """Also the ranks that wait for it where buffers are compared."""

    def body() -> str:
        engine = start(3)
        train(engine)
        states = [*engine.optimizer.state.values()]
        if engine.global_rank == rank:
            for state in states:
                state["odd"] = object()
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(tmp_path)
        for state in states:
            state.pop("odd", None)
        engine.save_checkpoint(tmp_path)
        return str(caught.value)

    texts = run_ranks(2, body)
    assert f"rank {rank} failed" in texts[1 - rank]


def test_a_parameter_without_elements(tmp_path: Path) -> None:
    def model() -> nn.Module:
        gpt = make_gpt()
        gpt.nothing = nn.Parameter(torch.zeros(0, 3))
        return gpt

    def body() -> None:
        engine = start(3, model=model())
        train(engine)
        engine.save_checkpoint(tmp_path)
        start(1, model=model()).load_checkpoint(tmp_path)

    run_ranks(2, body)
    manifest = json.loads((tmp_path / "global_step1" / "manifest.json").read_text())
    assert manifest["tensors"]["value/nothing"] == {"dtype": "F32", "shape": [0, 3], "pieces": []}


# --- tags ---------------------------------------------------------------------------------------


BAD_TAGS = [
    "",
    ".",
    "..",
    "../out",
    "a/b",
    "/abs",
    "a\0b",
    ".hidden",
    "latest",
    "latest.new",
    "x" * 300,
    "a\nb",
    "\ud800",
]


@pytest.mark.parametrize("tag", BAD_TAGS)
def test_a_tag_is_a_plain_name(tag: str, tmp_path: Path) -> None:
    engine = start()
    with pytest.raises(CheckpointError, match="tag"):
        engine.save_checkpoint(tmp_path / "in", tag=tag)
    with pytest.raises(CheckpointError, match="tag"):
        engine.load_checkpoint(tmp_path / "in", tag=tag)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_ranks_that_name_different_tags_all_stop(tmp_path: Path) -> None:
    def body() -> None:
        engine = start()
        with pytest.raises(CheckpointError, match="different tags: rank 0 'rank0', this rank 'rank1'"):
            engine.save_checkpoint(tmp_path, tag=f"rank{engine.global_rank}")

    run_ranks(2, body)
    assert tags(tmp_path) == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_latest_names_what_it_should(tmp_path: Path) -> None:
    engine = start()
    engine.save_checkpoint(tmp_path, tag="first")
    train(engine)
    engine.save_checkpoint(tmp_path, tag="aside", save_latest=False)
    assert (tmp_path / "latest").read_text().splitlines()[0] == "first"
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "first")
    assert engine.global_steps == 0
    assert engine.load_checkpoint(tmp_path, tag="aside")[0] == str(tmp_path / "aside")
    assert engine.global_steps == 1
    (tmp_path / "latest").unlink()
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "aside"), "the newest whole one"


def test_nothing_to_load_is_said_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = start()
    train(engine)
    with caplog.at_level(logging.WARNING, "zerolith"):
        assert engine.load_checkpoint(tmp_path / "none") == (None, None)
    assert "there is no checkpoint here" in caplog.text
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        engine.load_checkpoint(tmp_path, tag="typo")
    assert engine.global_steps == 1
    with pytest.raises(UsageError, match=r"checkpoint\.folder"):
        engine.save_checkpoint()


def test_a_tag_saved_again_replaces_the_old_one_whole(tmp_path: Path) -> None:
    engine = start()
    engine.save_checkpoint(tmp_path, tag="best")
    before = {path.name for path in (tmp_path / "best").iterdir()}
    train(engine)
    engine.save_checkpoint(tmp_path, tag="best")
    after = {path.name for path in (tmp_path / "best").iterdir()}
    assert len(after) == 2
    assert before & after == {"manifest.json"}
    fresh = start()
    fresh.load_checkpoint(tmp_path)
    assert_equal(whole_weights(fresh), whole_weights(engine))


# --- how long they stay -------------------------------------------------------------------------


def test_retention_keeps_the_last_ones_those_of_every_kth_step_and_named_ones(tmp_path: Path) -> None:
    engine = start(checkpoint={"keep_last": 2, "keep_every": 4})
    engine.save_checkpoint(tmp_path, tag="mine", save_latest=False)
    for _ in range(7):
        train(engine)
        engine.save_checkpoint(tmp_path)
    assert tags(tmp_path) == ["global_step4", "global_step6", "global_step7", "mine"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(tags(tmp_path)), "no empty folders"


def test_retention_leaves_what_is_not_ours(tmp_path: Path) -> None:
    engine = start(checkpoint={"keep_last": 1})
    engine.save_checkpoint(tmp_path)
    (tmp_path / "global_step0" / "notes.txt").write_text("mine")
    (tmp_path / "global_step99").mkdir()
    train(engine)
    engine.save_checkpoint(tmp_path)
    assert (tmp_path / "global_step0" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "global_step99").is_dir()
    assert tags(tmp_path) == ["global_step1"]


# --- behind the training ------------------------------------------------------------------------


class SlowDisk(Disk):
    """Lets a test decide when a file is synced."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def sync(self, file: int) -> None:
        assert self.go.wait(30), "the test forgot to let go"
        super().sync(file)


def test_a_save_behind_the_training_holds_the_state_of_the_call(tmp_path: Path) -> None:
    def body() -> None:
        engine = start(3, checkpoint={"async_save": True})
        engine._disk = SlowDisk()
        train(engine)
        weights = whole_weights(engine)
        assert engine.save_checkpoint(tmp_path)
        train(engine, 2)
        assert not (tmp_path / "latest").exists()
        engine._disk.go.set()
        engine.destroy()  # waits for it
        other = start(0)
        other.load_checkpoint(tmp_path)
        assert other.global_steps == 1
        assert_equal(whole_weights(other), weights)

    run_ranks(2, body)


@pytest.mark.parametrize("when_busy", ["wait", "drop"])
def test_a_save_while_one_is_under_way(when_busy: str, tmp_path: Path) -> None:
    def body() -> None:
        engine = start(2, checkpoint={"async_save": True, "when_busy": when_busy})
        engine._disk = disk = SlowDisk()
        assert engine.save_checkpoint(tmp_path, tag="one")
        if when_busy == "drop":
            assert not engine.save_checkpoint(tmp_path, tag="two")
            disk.go.set()
        else:
            threading.Timer(0.1, disk.go.set).start()
            assert engine.save_checkpoint(tmp_path, tag="two")
        engine.destroy()

    run_ranks(2, body)
    assert tags(tmp_path) == (["one"] if when_busy == "drop" else ["one", "two"])


def test_a_failure_behind_the_training_is_raised_at_a_step_of_all_ranks(tmp_path: Path) -> None:
    class Broken(Disk):
        def sync(self, file: int) -> None:
            raise OSError(5, "Input/output error")

    def body() -> None:
        engine = start(1, checkpoint={"async_save": True})
        if engine.global_rank == 1:
            engine._disk = Broken()
        engine.save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="Input/output error"):
            for _ in range(2000):
                train(engine)
        steps = engine.global_steps
        assert engine._sharded.comm.max([float(steps)], name="t") == [steps], "the same step on every rank"
        train(engine)
        engine._saver.disk = engine._disk = Disk()
        assert engine.save_checkpoint(tmp_path)
        engine.destroy()

    run_ranks(2, body)
    assert len(tags(tmp_path)) == 1


# --- other ways out -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_16_bit_model_is_one_safetensors_file(stage: int, tmp_path: Path) -> None:
    def body() -> None:
        engine = start(stage, bf16={"enabled": True})
        train(engine)
        assert engine.save_16bit_model(tmp_path)
        whole = engine._zero3_consolidated_16bit_state_dict()
        assert (whole is None) == (engine.global_rank > 0)
        weights = whole_weights(engine)
        if whole is not None:
            expected = {name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
            assert_equal(expected, weights)
            assert_equal(whole, {**weights, "head.weight": weights["embed.weight"]})
            make_gpt().load_state_dict(whole)
        train(engine)

    run_ranks(2, body)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_that_cannot_be_written_stop_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def body() -> None:
        engine = start(3)
        with pytest.raises(CheckpointError, match="cannot be saved"):
            engine.save_16bit_model(tmp_path / "file" / "sub")
        train(engine)

    run_ranks(2, body)


def test_weights_of_a_dtype_that_files_do_not_have_stop_all_ranks(tmp_path: Path) -> None:
    def body() -> str:
        model = make_gpt()
        model.register_buffer("phase", torch.zeros(3, dtype=torch.complex128))
        engine = start(3, model=model)
        with pytest.raises(CheckpointError, match="weights cannot be saved") as caught:
            engine.save_16bit_model(tmp_path)
        train(engine)
        return str(caught.value)

    assert "complex128" in run_ranks(2, body)[0]
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_json_and_says_what_is_there(tmp_path: Path) -> None:
    engine = start(3, bf16={"enabled": True})
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    manifest = json.loads((tmp_path / "global_step3" / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["num_ranks"] == 1
    record = manifest["parameters"]["embed.weight"]
    assert record["dtype"] == "BF16"
    assert record["aliases"] == ["head.weight"]
    assert record["trained"]
    assert manifest["tensors"]["value/embed.weight"]["dtype"] == "F32"
    assert record["optimizer"] == {"step": {"$scalar": ["F32", 3.0]}}


# --- engines that share a folder ----------------------------------------------------------------


def test_two_engines_of_a_process_share_a_folder_but_not_a_tag(tmp_path: Path) -> None:
    actor, critic = start(1, checkpoint={"async_save": True}), start(3)
    actor._disk = disk = SlowDisk()
    actor.save_checkpoint(tmp_path, tag="actor")
    with pytest.raises(CheckpointLockedError, match="another engine of this process"):
        critic.save_checkpoint(tmp_path, tag="actor")
    critic.save_checkpoint(tmp_path, tag="critic")
    disk.go.set()
    actor.destroy()
    critic.save_checkpoint(tmp_path, tag="actor")
    critic.destroy()
    assert tags(tmp_path) == ["actor", "critic"]
    Lock(tmp_path).release()  # both have let go
