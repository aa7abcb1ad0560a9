"""Files that DeepSpeed itself wrote, of every stage, become checkpoints from which an engine goes on."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import zerolith
from harness import run_ranks
from saved_runs import unpack
from zerolith.checkpoint import Reader, import_deepspeed
from zerolith.cli import main
from zerolith.errors import CheckpointDamagedError

HERE = Path(__file__).parent
ARCHIVE = HERE / "fixtures" / "deepspeed.tar.xz"

CASES = ["z0-2-sgd", "z1-3-fp32", "z2-2-fp16", "z2-2-bf16-universal", "z3-2-fp32", "z3-3-bf16"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of DeepSpeed's for each case, with the truth about it."""
    folder = tmp_path_factory.mktemp("deepspeed")
    unpack(ARCHIVE, folder)
    return folder


def maker() -> Any:
    """The program that made them: it has the model and its optimizers."""
    spec = importlib.util.spec_from_file_location("make_deepspeed_fixtures", HERE / "make_deepspeed_fixtures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_files_are_taken_bit_for_bit_and_training_goes_on(case: str, theirs: Path, tmp_path: Path) -> None:
    truth = torch.load(theirs / case / "truth.pt", weights_only=True)
    assert main(["checkpoint", "import", str(theirs / case), str(tmp_path / "job")]) == 0
    with Reader(tmp_path / "job" / "three") as reader:
        for name, value in truth["values"].items():
            assert torch.equal(reader.tensor(f"value/{name}"), value)
        for name, states in truth["states"].items():
            for key, value in states.items():
                assert torch.equal(reader.tensor(f"optimizer/{key}/{name}"), value)
        assert reader.manifest.state["optimizer"]["class"] == ""
        assert reader.manifest.state["counters"]["global_samples"] == truth["samples"]

    _, _, precision, kind, _ = maker().CASES[case.removesuffix("-universal")]
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}}

    def body(stage: int) -> None:
        logging.disable()  # it says that a step takes another number of samples now
        model = maker().Tiny()
        optimizer = maker().make_optimizer("sgd" if kind == "sgd" else "adamw", maker().param_groups(model))
        config: dict[str, Any] = {
            "train_batch_size": 6,
            "scheduler": schedule,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        engine, _, _, scheduler = zerolith.initialize(model=model, optimizer=optimizer, config=config)
        _, client = engine.load_checkpoint(tmp_path / "job")
        assert client.pop("counts").tolist() == [0, 1, 2, 3]
        assert client == {"epoch": 2, "history": [0.5, None, {"lr": 0.1}]}
        access = zerolith.zero
        for name, param in engine.module.named_parameters():
            if name in truth["states"]:
                assert torch.equal(access.safe_get_full_fp32_param(param), truth["values"][name])
                for key, value in truth["states"][name].items():
                    assert torch.equal(access.safe_get_full_optimizer_state(param, key), value)
        assert (engine.global_steps, engine.global_samples, scheduler.last_epoch) == (3, truth["samples"], 3)
        assert engine._scaler.scale == (truth["scale"] or 1.0)
        # DeepSpeed's rate is what our schedule would have set.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_lr()[0])
        engine.backward(engine(*torch.randint(0, 23, (2, 6 // engine.world_size))))
        engine.step()
        assert engine.global_steps == 4

    for stage, world in [(0, 1), (1, 2), (3, 2)]:
        run_ranks(world, body, stage)


def test_a_bit_that_flipped_in_their_files_is_not_sealed_in_ours(theirs: Path, tmp_path: Path) -> None:
    home = theirs / "z2-2-fp16" / "three"
    path = next(home.glob("*rank_1*optim_states.pt"))
    whole = path.read_bytes()
    data = bytearray(whole)
    data[data.index(b"data/0") + 200] ^= 1
    path.write_bytes(data)
    try:
        with pytest.raises(CheckpointDamagedError, match="checksum"):
            import_deepspeed(home, tmp_path / "job")
        assert not (tmp_path / "job").exists()
    finally:
        path.write_bytes(whole)
