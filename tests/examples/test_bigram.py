"""The bigram baseline against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gpt import bigram
from gpt.bigram import bigram_log_probabilities, bigram_loss, count_pairs
from gpt.data import Batch

STREAM = torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8)  # pairs 01, 10, 01, 11


def test_pairs_are_counted_by_hand() -> None:
    assert count_pairs(STREAM, vocab=2).tolist() == [[0, 2], [1, 1]]


def test_chunks_count_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_pairs(STREAM, vocab=2)
    for chunk_tokens in (1, 2, 3, 4):
        monkeypatch.setattr(bigram, "CHUNK_TOKENS", chunk_tokens)
        assert torch.equal(count_pairs(STREAM, vocab=2), whole)


def test_rows_are_distributions_even_where_nothing_was_seen() -> None:
    probabilities = bigram_log_probabilities(torch.tensor([[0, 2], [0, 0]])).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2]]).double())


def test_loss_by_hand() -> None:
    # After a 0: P(0) = 1/4, P(1) = 3/4. After a 1: P(0) = P(1) = 2/4.
    batches = [
        Batch(torch.tensor([[0, 0]]), torch.tensor([[0, 1]])),
        Batch(torch.tensor([[1]]), torch.tensor([[0]])),
    ]
    by_hand = -(math.log(1 / 4) + math.log(3 / 4) + math.log(2 / 4)) / 3
    assert bigram_loss(STREAM, batches, vocab=2) == pytest.approx(by_hand)
