"""Models by size. No torch: the driver reads them, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with rotary positions, RMS norms, gated feed-forward and grouped-query attention (Llama 3)."""

    layers: int
    width: int
    hidden: int  # of the feed-forward
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def num_params(self) -> int:
        """Embedding and head apart."""
        attention = 2 * self.width**2 + 2 * self.width * self.kv_heads * self.head_width
        return self.layers * (attention + 3 * self.width * self.hidden + 2 * self.width) + self.width * (
            2 * self.vocab + 1
        )

    def flops_per_token(self, seq: int) -> float:
        """Of forward and backward: 6 per weight that multiplies, and attention, causal (PaLM, arXiv:2204.02311, B)."""
        weights = self.num_params - self.vocab * self.width - (2 * self.layers + 1) * self.width
        return 6.0 * weights + 6.0 * self.layers * self.width * seq


SIZES = {
    "tiny": Shape(layers=2, width=64, hidden=128, heads=4, kv_heads=2, vocab=256),  # to try the script
    "1.5b": Shape(layers=28, width=2048, hidden=5632, heads=16, kv_heads=16, vocab=32000),
    "7b": Shape(layers=32, width=4096, hidden=11008, heads=32, kv_heads=32, vocab=32000),
    "8b": Shape(layers=32, width=4096, hidden=14336, heads=32, kv_heads=8, vocab=128256),
    "13b": Shape(layers=40, width=5120, hidden=13824, heads=40, kv_heads=40, vocab=32000),
}


def deeper(shape: Shape, layers: int) -> Shape:
    """The same with so many layers: to find the largest that fits."""
    fields = {name: getattr(shape, name) for name in ("width", "hidden", "heads", "kv_heads", "vocab")}
    return Shape(layers=layers, **fields)
