"""Products of bf16 matrices in fp32 are torch's own up to rounding, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmarks.bf16_products import Fp32Products
from torch import Tensor, nn


def products(dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of a linear layer and of attention."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, dtype=dtype), torch.randn(2, 16, 64, dtype=dtype, requires_grad=True)
    query = torch.randn(2, 2, 16, 32, dtype=dtype, requires_grad=True)
    mixed = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    (layer(x).float().square().sum() + mixed.float().square().sum()).backward()
    return [layer(x).detach(), mixed.detach(), *(each.grad for each in (x, query, *layer.parameters()))]


@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 2**-7), (torch.float32, 0.0)])
def test_products_are_those_of_torch_up_to_rounding(dtype: torch.dtype, relative: float) -> None:
    expected = products(dtype)
    through = Fp32Products()
    got = products(dtype)
    counted = through.seconds
    del through
    assert counted > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert float((ours - theirs).float().norm()) <= relative * float(theirs.float().norm())
    assert all(map(torch.equal, products(dtype), expected)), "torch's own are back"
