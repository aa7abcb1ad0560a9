"""The sizes of the model: integers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTShape:
    """The sizes of a model. `width` is a multiple of `head_dim`, which is even."""

    vocab: int = 256
    layers: int = 4
    width: int = 192
    head_dim: int = 32
    seq_len: int = 128  # longest input, in tokens
    tied: bool = True  # the head reads the embedding's weight

    @property
    def num_heads(self) -> int:
        """Attention heads of one block."""
        return self.width // self.head_dim
