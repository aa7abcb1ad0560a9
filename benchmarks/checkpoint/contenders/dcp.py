"""torch.distributed.checkpoint of an FSDP2 model and its AdamW, with DCP's defaults, which sync the files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from benchmarks.checkpoint.contenders.tensors import TensorState, empty_model
from benchmarks.checkpoint.job import StoreJob
from benchmarks.engines import fsdp2
from benchmarks.engines.torch_engine import TorchEngine

STATES = ("exp_avg", "exp_avg_sq")


def build(job: StoreJob, *, behind: bool) -> DcpState:
    """Collective."""
    device = torch.device("cpu")
    fsdp2.rendezvous(device)
    return DcpState(fsdp2.build(job, empty_model(job), device, reshard=True), behind=behind)


class DcpState(TensorState):
    """An FSDP2 model and its optimizer as they are between steps."""

    def __init__(self, engine: TorchEngine, *, behind: bool) -> None:
        super().__init__()
        self.engine = engine
        self.behind = behind
        self._under_way: Future[Any] | None = None  # Any: DCP's metadata
        for param in engine.model.parameters():
            states = {name: torch.empty_like(param.detach()) for name in STATES}
            engine.optimizer.state[param] = {"step": torch.tensor(1.0), **states}

    def tensors(self) -> Iterator[Tensor]:
        for param in self.engine.model.parameters():
            state = self.engine.optimizer.state[param]
            for tensor in (param.detach(), *(state[name] for name in STATES)):
                # cast: fully_shard makes every parameter a DTensor, and so are the states made from one.
                yield cast(DTensor, tensor).to_local()

    def save(self, path: Path) -> None:
        if self.behind:
            # cast: async_save returns something else only when told to.
            self._under_way = cast("Future[Any]", dcp.async_save(self._state_dict(), checkpoint_id=path))
        else:
            dcp.save(self._state_dict(), checkpoint_id=path)

    def flush(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def load(self, path: Path) -> None:
        state = self._state_dict()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            self.engine.model,
            self.engine.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.engine.model, self.engine.optimizer)
        return {"model": model, "optimizer": optimizer}
