"""The GPT that every engine trains, and its data. Plain torch: knows no engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.job import Job, Shape

INIT_STD = 0.02


class Block(nn.Module):
    """Pre-norm attention and MLP, fused qkv."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Returns the loss: an engine that wraps forward then wraps all of the arithmetic."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.emb = nn.Embedding(shape.vocab, shape.width)
        self.pos = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.head.weight = self.emb.weight
        self.apply(_init_weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in fp32. `x`, `y`: (batch, seq) int64."""
        hidden = self.emb(x) + self.pos(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), y.view(-1))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model(job: Job) -> GPT:
    """The same fp32 weights on every rank and in every engine."""
    torch.manual_seed(job.seed)
    return GPT(job.shape)


class Batch(NamedTuple):
    x: Tensor  # (micro_batch, seq) int64
    y: Tensor  # x shifted by one


def make_batch(job: Job, *, step: int, rank: int) -> Batch:
    """On the CPU; fixed by (seed, step, rank). Skewed to small ids, so that there is something to learn."""
    generator = torch.Generator().manual_seed((job.seed * 1_000_003 + step) * 1_009 + rank)
    uniform = torch.rand(job.micro_batch, job.seq + 1, generator=generator, dtype=torch.float64)
    tokens = (uniform.pow(4) * job.shape.vocab).long()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
