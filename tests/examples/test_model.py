"""The model: shapes, tied weights, causality, positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gpt.model import GPT, rotary_tables, rotate
from gpt.shape import GPTShape

SMALL = GPTShape(vocab=11, layers=2, width=16, head_dim=8, seq_len=12)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SMALL.vocab, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


def test_logits_have_one_row_per_token(model: GPT, tokens: torch.Tensor) -> None:
    assert model(tokens).shape == (3, 9, SMALL.vocab)


def test_with_targets_it_returns_their_mean_loss(model: GPT, tokens: torch.Tensor) -> None:
    log_probabilities = model(tokens).log_softmax(dim=-1)
    by_hand = -log_probabilities.gather(2, tokens.unsqueeze(2)).mean()
    torch.testing.assert_close(model(tokens, tokens), by_hand)


def test_a_new_model_is_about_as_good_as_guessing(model: GPT, tokens: torch.Tensor) -> None:
    # Not the tokens themselves: a tied model starts with a leaning to repeat its input.
    loss = model(tokens, (tokens + 1) % SMALL.vocab).item()
    assert loss == pytest.approx(math.log(SMALL.vocab), abs=1)


def test_a_tied_head_is_the_embedding(model: GPT, tokens: torch.Tensor) -> None:
    assert model.head.weight is model.embedding.weight
    model(tokens, tokens).backward()
    untied = GPT(replace(SMALL, tied=False))
    assert untied.head.weight is not untied.embedding.weight
    assert _num_parameters(untied) - _num_parameters(model) == SMALL.vocab * SMALL.width


def test_a_block_has_twelve_squares_of_its_width(model: GPT) -> None:
    squares, vectors = 12 * SMALL.width**2, 13 * SMALL.width
    assert _num_parameters(model.blocks[0]) == squares + vectors


def test_every_parameter_gets_a_gradient(model: GPT, tokens: torch.Tensor) -> None:
    model(tokens, tokens).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_token_does_not_see_the_next(model: GPT, tokens: torch.Tensor) -> None:
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % SMALL.vocab
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_order_matters(model: GPT) -> None:
    last = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
    assert not torch.allclose(last[0], last[1])


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    cos, sin = rotary_tables(8, 4)
    query, key = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    queries, keys = rotate(query.expand(8, 4), cos, sin), rotate(key.expand(8, 4), cos, sin)
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(8))
    torch.testing.assert_close(queries[5] @ keys[2], queries[7] @ keys[4])


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
