"""torch.distributed.checkpoint saves and loads a model's state dict at rest, whatever the stage and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from harness import run_ranks
from models import differing, sgd, start_engine, whole_weights, zero_config
from unusual import CASES, OddShapes
from zerolith.errors import ShardedAccessError
from zerolith.parameter import ShardedParameter

STAGES = (0, 1, 2, 3)


class Shapes(OddShapes):
    """Tensors of each number of dimensions that end anywhere in a shard; one has no elements, one no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(7, 11, 13))
        self.table = nn.Embedding(37, 19)
        self.norm = nn.BatchNorm1d(8)


def engine_for(stage: int, *, seed: int = 0, bucket: int = 10**9, half: bool = False) -> Any:
    torch.manual_seed(seed)
    zero = {"stage3_param_persistence_threshold": 100, "reduce_bucket_size": bucket}
    return start_engine(Shapes(), zero_config(stage, zero_optimization=zero, bf16={"enabled": half}), sgd)


def save(folder: Path, stage: int) -> dict[str, Tensor]:
    engine = engine_for(stage)
    for step in range(2):
        engine.backward(engine(torch.ones(3, 8), step, 0))
        engine.step()
    dcp.save(engine.module.state_dict(), checkpoint_id=folder)
    return whole_weights(engine)


def load(folder: Path, stage: int, bucket: int) -> dict[str, Tensor]:
    """The weights after loading and a step that changes nothing."""
    engine = engine_for(stage, seed=1, bucket=bucket)
    state = engine.module.state_dict()
    dcp.load(state, checkpoint_id=folder)
    engine.module.load_state_dict(state)
    for group in engine.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    engine.backward(engine(torch.ones(3, 8), 0, 0))
    engine.step()
    return whole_weights(engine)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "bucket"),
    [
        ((2, 3), (2, 3), 10**9),
        ((2, 3), (4, 3), 300),
        ((4, 3), (1, 3), 10**9),
        ((2, 3), (2, 1), 300),
        ((2, 0), (3, 3), 50),
    ],
)
def test_a_checkpoint_is_loaded_by_other_ranks_stages_and_buckets(
    saved_by: tuple[int, int], loaded_by: tuple[int, int], bucket: int, tmp_path: Path
) -> None:
    """saved_by, loaded_by: (ranks, stage)"""
    saved = run_ranks(saved_by[0], save, tmp_path, saved_by[1])[0]
    for loaded in run_ranks(loaded_by[0], load, tmp_path, loaded_by[1], bucket):
        assert differing(loaded, saved) == []


def load_plain(folder: Path) -> list[str]:
    plain = Shapes()
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=folder)
    plain.load_state_dict(state)
    return differing(dict(plain.named_parameters()), {name: value for name, value in SAVED.items()})


SAVED: dict[str, Tensor] = {}  # read by a forked rank


def test_a_plain_model_loads_what_stage_3_saved(tmp_path: Path) -> None:
    SAVED.update(run_ranks(2, save, tmp_path, 3)[0])
    assert run_ranks(1, load_plain, tmp_path) == [[]]


def load_back_and_forth(folder: Path) -> list[str]:
    """A stage 3 engine loads what a plain model saved."""
    torch.manual_seed(3)
    plain = Shapes()
    dcp.save(plain.state_dict(), checkpoint_id=folder)
    engine = engine_for(3, seed=1)
    state = engine.module.state_dict()
    dcp.load(state, checkpoint_id=folder)
    return differing(whole_weights(engine), {name: param.detach() for name, param in plain.named_parameters()})


def test_stage_3_loads_what_a_plain_model_saved_straight_into_its_shards(tmp_path: Path) -> None:
    assert run_ranks(2, load_back_and_forth, tmp_path) == [[], []]


def every_rank_writes_its_share() -> tuple[int, int]:
    state = engine_for(3).module.state_dict()
    sharded = {name: value for name, value in state.items() if isinstance(value, ShardedParameter)}
    items = [item for name, value in sharded.items() for item in value.__create_write_items__(name, value)]
    written = sum(item.tensor_data.chunk.sizes.numel() for item in items)
    return written, sum(value.numel() for value in sharded.values())


def test_each_rank_writes_its_own_elements_and_together_they_write_all() -> None:
    (first, total), (second, _) = run_ranks(2, every_rank_writes_its_share)
    assert first + second == total
    assert min(first, second) > 0.3 * total


def state_dict_in_use(stage: int) -> dict[str, Any]:
    engine = engine_for(stage)
    loss = engine(torch.ones(3, 8), 0, 0)
    state = engine.module.state_dict()  # between forward and backward: the backward still works
    engine.backward(loss)
    engine.step()
    if stage == 3:
        with pytest.raises(ShardedAccessError, match="is sharded"):
            torch.save(state, "/dev/null")
    return {"names": list(state), "shapes": [tuple(value.shape) for value in state.values()]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_dict_can_be_taken_at_any_time_and_has_the_plain_names_and_shapes(stage: int) -> None:
    plain = Shapes().state_dict()
    expected = {"names": list(plain), "shapes": [tuple(value.shape) for value in plain.values()]}
    assert run_ranks(2, state_dict_in_use, stage) == [expected] * 2


def load_what_is_not_there(folder: Path) -> str:
    torch.manual_seed(0)
    kept = CASES["plain"]().state_dict()
    del kept["layers.0.gain"]
    dcp.save(kept, checkpoint_id=folder)
    engine = start_engine(CASES["plain"](), zero_config(3), sgd)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(engine.module.state_dict(), checkpoint_id=folder)
    return str(caught.value)


def test_a_checkpoint_without_a_parameter_is_refused_by_its_name(tmp_path: Path) -> None:
    assert "layers.0.gain" in run_ranks(1, load_what_is_not_there, tmp_path)[0]
