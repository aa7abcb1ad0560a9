"""The baseline to beat: a byte bigram model with add-one smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt.data import Batch

CHUNK_TOKENS = 1 << 20  # bounds the int64 copies made while counting


def count_pairs(stream: Tensor, *, vocab: int) -> Tensor:
    """How often each token follows each other one: (vocab, vocab) int64, row = the token before."""
    counts = torch.zeros(vocab * vocab, dtype=torch.int64)
    for start in range(0, len(stream) - 1, CHUNK_TOKENS):
        chunk = stream[start : start + CHUNK_TOKENS + 1].long()
        counts += torch.bincount(chunk[:-1] * vocab + chunk[1:], minlength=vocab * vocab)
    return counts.view(vocab, vocab)


def bigram_log_probabilities(counts: Tensor) -> Tensor:
    """log P(column | row) in nats with one added to every count: (vocab, vocab) float64."""
    smoothed = counts.double() + 1.0
    return (smoothed / smoothed.sum(dim=1, keepdim=True)).log()


def bigram_loss(stream: Tensor, batches: Sequence[Batch], *, vocab: int) -> float:
    """Mean nats per token on `batches` of the bigram model estimated from `stream`."""
    log_probabilities = bigram_log_probabilities(count_pairs(stream, vocab=vocab))
    total = sum(float(log_probabilities[batch.tokens, batch.targets].sum()) for batch in batches)
    return -total / sum(batch.targets.numel() for batch in batches)
