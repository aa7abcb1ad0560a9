"""zerolith: save_checkpoint and load_checkpoint, at once or behind the training."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoint.contenders.tensors import TensorState, empty_model
from benchmarks.checkpoint.job import StoreJob
from benchmarks.engines.json_engine import config

STATES = ("exp_avg", "exp_avg_sq")


def build(job: StoreJob, *, stage: int, behind: bool) -> ZeroState:
    """Collective."""
    zerolith = importlib.import_module("zerolith")
    zerolith.init_distributed()
    settings = {**config(job, stage=stage), "checkpoint": {"async_save": behind}}
    engine, *_ = zerolith.initialize(model=empty_model(job), config=settings)
    return ZeroState(engine)


class ZeroState(TensorState):
    """An engine as it is between steps, with no gradients."""

    # Any: the library may be missing from the interpreter that checks the types.
    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine
        for group in engine.optimizer.param_groups:
            for param in group["params"]:
                states = {name: torch.empty_like(param.data) for name in STATES}
                engine.optimizer.state[param].update(step=torch.tensor(1.0), **states)

    def tensors(self) -> Iterator[Tensor]:
        """Without the gaps between parameters, which are not saved."""
        optimizer = self.engine._partitioned
        for own in optimizer.gradients:
            for index in range(len(own.section.members)):
                for param, inside, _ in optimizer.locate(own, index):
                    state = optimizer.inner.state[param]
                    for tensor in (param.data, *(state[name] for name in STATES)):
                        yield tensor.view(-1)[inside.start : inside.stop]

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(path.parent, tag=path.name)

    def flush(self) -> None:
        self.engine._saver.flush()

    def load(self, path: Path) -> None:
        self.engine.load_checkpoint(path.parent, tag=path.name)

    def close(self) -> None:
        self.engine.destroy()
        super().close()
