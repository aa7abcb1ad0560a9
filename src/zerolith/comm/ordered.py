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
    widen = into.device.type == "cpu" and any(term.dtype != into.dtype for term in terms)
    # torch adds mixed dtypes on CPU element by element; widening a cached chunk first is 3x faster.
    width = CHUNK if widen else max(into.numel(), 1)
    for start in range(0, into.numel(), width):
        part, *rest = (tensor[start : start + width] for tensor in (into, *terms))
        if fresh and len(rest) > 1 and rest[0].dtype == rest[1].dtype == into.dtype:
            torch.add(rest.pop(0), rest.pop(0), out=part)
        elif fresh:
            part.copy_(rest.pop(0))
        for term in rest:
            part.add_(term.to(part.dtype) if widen else term)
