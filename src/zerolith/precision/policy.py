"""Which dtype computes, travels, accumulates and is the master."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Dtypes by role; None means "as the parameter is".

    A parameter of dtype p computes in `compute or p`; its gradient travels in `reduce or compute`, is added up
    in `accumulate` and steps a master in `master`. Both default to fp32 for half-precision parameters and to
    the parameter's own dtype for wider ones.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    autocast: torch.dtype | None = None  # run forward under torch.autocast with this dtype
    predivide: float = 1.0  # gradients travel divided by this, so that their sum fits the wire dtype

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.compute if self.compute is not None and dtype.is_floating_point else dtype

    def reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.reduce or self.compute_dtype(dtype)

    def accumulate_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.accumulate or self.master_dtype(self.compute_dtype(dtype))

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype in HALF else dtype
