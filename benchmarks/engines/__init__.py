"""The engines by name. No torch here: the driver lists them, only a worker imports one.

An adapter is one module with two functions:

    rendezvous(device)                      meets the ranks, by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    build(job, model, device, **options)    takes the fp32 model and returns an Engine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmarks.job import Job


class Engine(Protocol):
    """One training step in three parts."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None:
        """Updates the weights and drops the gradients."""

    def close(self) -> None:
        """Collective. Leaves the process group."""


class Adapter(Protocol):
    """What an adapter module offers."""

    def rendezvous(self, device: torch.device) -> None: ...

    def build(self, job: Job, model: nn.Module, device: torch.device, **options: int | bool) -> Engine: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where an engine's adapter is and how to start it."""

    adapter: str
    library: str  # the distribution whose version a result records
    options: Mapping[str, int | bool] = field(default_factory=dict)
    max_ranks: int | None = None  # None: one process per rank of the run


def _stages(prefix: str, adapter: str, library: str) -> dict[str, Entry]:
    return {f"{prefix}{stage}": Entry(adapter=adapter, library=library, options={"stage": stage}) for stage in range(4)}


ENGINES: dict[str, Entry] = {
    "plain": Entry(adapter="benchmarks.engines.plain", library="torch", max_ranks=1),
    "floor": Entry(adapter="benchmarks.engines.floor", library="torch"),
    "ddp": Entry(adapter="benchmarks.engines.ddp", library="torch"),
    "fsdp2": Entry(adapter="benchmarks.engines.fsdp2", library="torch", options={"reshard": True}),
    # Keeps the gathered weights between forward and backward, as DeepSpeed's stage 3 does at these sizes.
    "fsdp2_nr": Entry(adapter="benchmarks.engines.fsdp2", library="torch", options={"reshard": False}),
    **_stages("ds", "benchmarks.engines.ds", "deepspeed"),
    **_stages("zero", "benchmarks.engines.zero", "zerolith"),
    "zero3_disk": Entry(
        adapter="benchmarks.engines.zero", library="zerolith", options={"stage": 3, "disk": True, "overlaps": True}
    ),
    "zero3_disk_waits": Entry(
        adapter="benchmarks.engines.zero", library="zerolith", options={"stage": 3, "disk": True, "overlaps": False}
    ),
}
