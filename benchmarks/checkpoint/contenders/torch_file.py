"""torch.save and torch.load of each rank's share of the same tensors, one file per rank; ranks do not talk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoint.contenders.tensors import TensorState, empty_model
from benchmarks.checkpoint.job import StoreJob

KINDS = ("value", "exp_avg", "exp_avg_sq")


def build(job: StoreJob, *, synced: bool, mapped: bool) -> TorchState:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shares = {name: len(range(rank, param.numel(), world)) for name, param in empty_model(job).named_parameters()}
    return TorchState(shares, name=f"rank{rank}.pt", synced=synced, mapped=mapped)


class TorchState(TensorState):
    """Flat tensors by kind and parameter, as a state dict."""

    def __init__(self, shares: dict[str, int], *, name: str, synced: bool, mapped: bool) -> None:
        super().__init__()
        self.state = {kind: {parameter: torch.empty(numel) for parameter, numel in shares.items()} for kind in KINDS}
        self.name = name
        self.synced = synced
        self.mapped = mapped

    def tensors(self) -> Iterator[Tensor]:
        for kind in KINDS:
            yield from self.state[kind].values()

    def save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        with (path / self.name).open("xb") as file:
            torch.save(self.state, file)
            if self.synced:
                file.flush()
                os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """Into the tensors that are there, as load_state_dict does."""
        loaded = torch.load(path / self.name, mmap=self.mapped, weights_only=True)
        for kind in KINDS:
            for parameter, tensor in self.state[kind].items():
                tensor.copy_(loaded[kind][parameter])
