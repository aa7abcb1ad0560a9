"""A decoder of the kind of Llama 3, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.shapes import Shape

ROPE_BASE = 500_000.0


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.q, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(shape.width, kv_width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (
            part(x).view(batch, time, -1, self.shape.head_width).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(
            rotated(q, turn), rotated(k, turn), v, is_causal=True, enable_gqa=self.shape.kv_heads < self.shape.heads
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before_attention, self.before_ff = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention, self.ff = Attention(shape), FeedForward(shape)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), turn)
        return x + self.ff(self.before_ff(x))


class Llama(nn.Module):
    """(batch, time) tokens to the mean loss of predicting the next ones."""

    def __init__(self, shape: Shape, seq: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        powers = torch.arange(0, shape.head_width, 2, device="cpu") / shape.head_width
        angles = torch.outer(torch.arange(seq, device="cpu").float(), ROPE_BASE**-powers)
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.turn[:, : x.shape[1]])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv:2104.09864): pairs are elements i and i + half."""
    cos, sin = turn.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
