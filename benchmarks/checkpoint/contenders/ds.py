"""DeepSpeed's save_checkpoint and load_checkpoint, which sync nothing, stages 1 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoint.contenders.tensors import TensorState
from benchmarks.checkpoint.job import StoreJob
from benchmarks.engines import ds
from benchmarks.engines.json_engine import JsonEngine
from benchmarks.gpt import build_model, make_batch

MASTERS = {1: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
STATES = ("exp_avg", "exp_avg_sq")


def build(job: StoreJob, *, stage: int) -> DsState:
    """Collective. Its optimizer makes the states in a step."""
    device = torch.device("cpu")
    ds.rendezvous(device)
    engine = ds.build(job, build_model(job), device, stage=stage)
    batch = make_batch(job, step=0, rank=0)
    engine.backward(engine.forward(batch.x, batch.y))
    engine.step()
    return DsState(engine, stage)


class DsState(TensorState):
    """An engine as it is between steps."""

    def __init__(self, engine: JsonEngine, stage: int) -> None:
        super().__init__()
        self.engine = engine
        self.stage = stage

    def tensors(self) -> Iterator[Tensor]:
        optimizer = self.engine.engine.optimizer
        for master in getattr(optimizer, MASTERS[self.stage]):
            state = optimizer.optimizer.state[master]
            yield from (master.data, *(state[name] for name in STATES))

    def save(self, path: Path) -> None:
        self.engine.engine.save_checkpoint(str(path.parent), tag=path.name)

    def load(self, path: Path) -> None:
        self.engine.engine.load_checkpoint(str(path.parent), tag=path.name)

    def close(self) -> None:
        self.engine.close()
