"""Adding low-precision terms to a wider accumulator, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerolith import kernels
from zerolith.layout import BLOCK


def add_into(into: Tensor, terms: Sequence[Tensor], *, fresh: bool, squares: Tensor | None = None) -> None:
    """into = terms[0] + terms[1] + ... (fresh), or into += terms[0], += terms[1], ..., left to right.

    into: (n,) accumulator. terms: (n,) each, all of `into`'s dtype or all of a narrower one; every addition is in
    `into`'s dtype; with `fresh` the first may be `into` itself. squares: see `block_squares`; those of the result are
    written there. Does not communicate.
    """
    rest = list(terms)
    if fresh and rest[0].data_ptr() == into.data_ptr():
        rest.pop(0)
        fresh = False
    if rest and _suit(into, rest):
        kernels.add(into, rest, fresh=fresh, blocks=squares)
        return
    if fresh:
        into.copy_(rest.pop(0))
    for term in rest:
        into.add_(term.to(into.dtype))
    if squares is not None:
        squares.copy_(block_squares(into))


def _suit(into: Tensor, terms: Sequence[Tensor]) -> bool:
    """Whether the kernels can add them."""
    dtypes = {term.dtype for term in terms}
    is_plain = all(type(each) is Tensor and each.is_contiguous() for each in (into, *terms))
    return is_plain and into.dtype is torch.float32 and len(dtypes) == 1 and dtypes <= {*kernels.FORMATS}


def block_squares(values: Tensor) -> Tensor:
    """(blocks,) fp64: the square sums of a flat tensor's blocks, infinite or NaN only where a number of one is.

    Squares of fp64 numbers, which have no wider dtype, may be too large. Does not wait for the device.
    """
    if values.dtype is torch.float64:
        return values.view(-1, BLOCK).square().sum(dim=1)
    return kernels.square_sums(values)
