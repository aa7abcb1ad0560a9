"""A state is known again: by kind, by place, by every element."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.checkpoint.contenders.tensors import BLOCK_NUMEL, TensorState, empty_model
from benchmarks.checkpoint.contenders.torch_file import TorchState
from benchmarks.checkpoint.job import StoreJob
from benchmarks.checkpoint.worker import measured
from torch import Tensor


class Held(TensorState):
    """Two tensors, one of them longer than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.empty(BLOCK_NUMEL + 3), torch.empty(2, 3)]

    def tensors(self) -> Iterator[Tensor]:
        return iter(self.held)

    def save(self, path: Path) -> None:
        del path

    def load(self, path: Path) -> None:
        del path


def filled() -> Held:
    state = Held()
    state.fill()
    return state


def test_a_state_that_nobody_touched_is_right() -> None:
    state = filled()
    state.check()
    assert state.state_bytes() == 4 * (BLOCK_NUMEL + 3 + 6)


@pytest.mark.parametrize("index", [0, BLOCK_NUMEL + 2])
def test_one_wrong_element_is_noticed(index: int) -> None:
    state = filled()
    state.held[0][index] += 1
    with pytest.raises(ValueError, match="not what was saved"):
        state.check()


def test_tensors_that_changed_places_are_noticed() -> None:
    state = filled()
    state.held[1].copy_(state.held[0][:6].view(2, 3))
    with pytest.raises(ValueError, match="not what was saved"):
        state.check()


def test_a_forgotten_state_is_not_the_saved_one() -> None:
    state = filled()
    state.forget()
    with pytest.raises(ValueError, match="not what was saved"):
        state.check()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_state_dict_comes_back_from_its_file(tmp_path: Path, mapped: bool) -> None:
    state = TorchState({"w": 5, "b": 2}, name="rank0.pt", synced=True, mapped=mapped)
    state.fill()
    state.save(tmp_path / "new")
    state.forget()
    state.load(tmp_path / "new")
    state.check()


def test_the_empty_model_keeps_its_tie() -> None:
    model = empty_model(StoreJob.of("zero1", "tiny"))
    assert model.head.weight is model.emb.weight
    assert {param.device.type for param in model.parameters()} == {"cpu"}


def test_a_measurement_sees_memory_that_is_gone_at_its_end() -> None:
    """In a process of its own: others may keep the pages of what they had before."""
    root = Path(__file__).parents[2]
    program = (
        "import json, torch\n"
        f"from {measured.__module__} import measured\n"
        "print(json.dumps([measured(lambda: torch.ones(16_000_000).sum()), measured(lambda: None)]))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=True)
    answer, idle = json.loads(done.stdout)
    assert answer["end"] > answer["begin"]
    assert 60 < answer["peak_mb"] - answer["before_mb"] < 90
    assert idle["peak_mb"] < answer["peak_mb"]
