"""Runs that have saved a checkpoint, what they held then, and ways to spoil what they saved."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zerolith
from models import make_gpt, my_pieces, start_engine, token_batches, whole_weights, zero_config
from zerolith.checkpoint.manifest import read_manifest

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP32: dict[str, Any] = {}


class Truth(NamedTuple):
    """What an engine held when it saved."""

    masters: dict[str, Tensor]  # the weights, where they are frozen
    weights: dict[str, Tensor]  # in the dtype that the model computes in


def train_and_save(
    folder: Path, stage: int, precision: dict[str, Any], make: Callable[[], nn.Module] = make_gpt
) -> Truth:
    """Two steps, the second one saved. Collective."""
    engine = start_engine(make(), zero_config(stage, **precision))
    for batch in token_batches(2, 4 * engine.world_size):
        for piece in my_pieces(batch, engine):
            engine.backward(engine(piece))
            engine.step()
    engine.save_checkpoint(folder)
    weights = whole_weights(engine)
    masters = {
        name: zerolith.zero.safe_get_full_fp32_param(param).clone()
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    }
    truth = Truth({name: masters.get(name, weight) for name, weight in weights.items()}, weights)
    engine.destroy()
    return truth


class Odd(nn.Module):
    """Everything that a state dict may hold, and tensors that do not lie row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.image = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(3, 8).t())
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.fixed = nn.Linear(8, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.bytes: Tensor
        self.register_buffer("bytes", torch.arange(3, dtype=torch.uint8))
        self.register_buffer("turned_buffer", torch.randn(3, 4).t())
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.noted = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.first(tokens[:, :8].to(self.scalar.dtype) / 64))
        x = self.norm(x) @ self.turned * self.scalar + self.empty.sum()
        self.noted += 1
        return x.square().mean() + self.image(torch.ones(1, 2, 3, 3, dtype=x.dtype)).mean()

    def get_extra_state(self) -> Any:
        return {"noted": self.noted, "where": (1, 2), "tensor": torch.full((2,), float(self.noted))}

    def set_extra_state(self, state: Any) -> None:
        assert torch.equal(state["tensor"], torch.full((2,), float(state["noted"])))
        self.noted = state["noted"]


def make_odd(seed: int = 0) -> Odd:
    torch.manual_seed(seed)
    return Odd()


def data_file(home: Path, rank: int) -> Path:
    """What this rank wrote of the checkpoint in `home`."""
    return home / read_manifest(home).files[rank].name


def flip(home: Path, tensor: str) -> tuple[str, int]:
    """Change a bit of a tensor; returns the file's name and where in it the tensor's first piece begins."""
    manifest = read_manifest(home)
    piece = manifest.tensors[tensor].pieces[0]
    path = home / manifest.files[piece.file].name
    data = bytearray(path.read_bytes())
    data[piece.offset + 5] ^= 4
    path.write_bytes(data)
    return path.name, piece.offset


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless names, dtypes, shapes and bits agree."""
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(got[name], value), name


def unpack(archive: Path, folder: Path) -> None:
    """A tar archive of our own. Pythons before 3.11.4 know no filters."""
    filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **filters)
