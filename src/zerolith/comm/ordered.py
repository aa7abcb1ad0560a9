"""Adding low-precision terms to a wider accumulator, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 17  # elements: a chunk's accumulator and scratch stay in a core's cache


def add_into(into: Tensor, terms: Sequence[Tensor], *, fresh: bool) -> None:
    """into = terms[0] + terms[1] + ... (fresh), or into += terms[0], += terms[1], ..., left to right.

    into: (n,) accumulator. terms: (n,) each, of `into`'s dtype or a narrower one; every addition is in
    `into`'s dtype. Does not communicate.
    """
    if into.device.type == "cpu" and any(term.dtype != into.dtype for term in terms):
        for start in range(0, into.numel(), CHUNK):
            # torch adds mixed dtypes on CPU element by element; widening a cached chunk first is 3x faster.
            chunk = slice(start, start + CHUNK)
            _add(into[chunk], [term[chunk] for term in terms], fresh=fresh, widen=True)
    else:
        _add(into, terms, fresh=fresh, widen=False)


def _add(into: Tensor, terms: Sequence[Tensor], *, fresh: bool, widen: bool) -> None:
    rest = list(terms)
    if fresh:
        if len(rest) > 1 and all(term.dtype == into.dtype for term in rest[:2]):
            torch.add(rest.pop(0), rest.pop(0), out=into)
        else:
            into.copy_(rest.pop(0))
    for term in rest:
        into.add_(term.to(into.dtype) if widen else term)
