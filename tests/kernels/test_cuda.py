"""Triton's kernels equal the reference on the CPU, bit by bit."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import RECIPES, TARGETS, Values, any_bits, ordinary, run, same, wild
from zerolith import kernels
from zerolith.kernels import reference
from zerolith.kernels.arrays import CHUNK, FORMATS
from zerolith.kernels.backend import backend_for
from zerolith.kernels.recipe import Recipe
from zerolith.layout import BLOCK

pytestmark = pytest.mark.gpu


def on_gpu(values: Values) -> Values:
    return Values(values.master.cuda(), [state.cuda() for state in values.states], values.grad.cuda())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_updates_equal_the_reference(recipe: Recipe, dtype: torch.dtype, target: str) -> None:
    torch.manual_seed(0)
    backend = backend_for(torch.device("cuda"))
    assert backend is not reference, "there is no Triton"
    for make in (ordinary, wild):
        values = make(recipe.kind, 5003, dtype)
        for part in (slice(None), slice(3, 1000), slice(0, 0)):
            expected = run(reference, recipe, values, target, part=part)
            mine = run(backend, recipe, on_gpu(values), target, part=part)
            assert all(same(left.cpu(), right) for left, right in zip(mine, expected, strict=True))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 257, CHUNK + 1, 130 * CHUNK + 5])
def test_sums_equal_those_of_the_cpu(dtype: torch.dtype, numel: int) -> None:
    torch.manual_seed(1)
    terms, target = [torch.randn(numel).to(dtype) for _ in range(3)], torch.randn(numel)
    there = [term.cuda() for term in terms]
    assert torch.equal(kernels.square_sums(there[0]).cpu(), kernels.square_sums(terms[0]))
    for fresh in (False, True):
        for some in (slice(1), slice(3)):
            expected, mine = target.clone(), target.cuda()
            squares = torch.zeros(-(-numel // BLOCK), dtype=torch.float64)
            blocks = squares.cuda()
            kernels.add(mine, there[some], fresh=fresh, blocks=blocks)
            kernels.add(expected, terms[some], fresh=fresh, blocks=squares)
            assert torch.equal(mine.cpu(), expected)
            assert torch.equal(blocks.cpu(), squares)


def test_splitting_and_joining_equal_those_of_the_cpu() -> None:
    torch.manual_seed(2)
    master = any_bits(100_001)
    mine, expected = kernels.split(master.cuda()), kernels.split(master)
    assert torch.equal(mine.weight.view(torch.int16).cpu(), expected.weight.view(torch.int16))
    assert torch.equal(mine.remainder.cpu(), expected.remainder)
    assert same(kernels.join(mine).cpu(), kernels.join(expected))
