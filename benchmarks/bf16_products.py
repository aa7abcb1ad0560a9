"""Products of bf16 matrices as a processor without bf16 instructions can make them: in fp32, rounded to bf16.

torch's own way there takes up to a hundred times as long as fp32's, which dwarfs all that engines differ in. With this
in place the products of every engine take fp32's time and a cast of what they read and write.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class Fp32Products:
    """In place, in this process, for as long as it lives. Counts what the products take."""

    def __init__(self) -> None:
        self._spent_s = [0.0]
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that its own kernels are replaced
            for name in PRODUCTS:
                own = torch.library.get_kernel(f"aten::{name}", "CPU")
                self._library.impl(
                    name, _through_fp32(own, self._spent_s), "CPU", with_keyset=True, allow_override=True
                )

    @property
    def seconds(self) -> float:
        """In products until now."""
        return self._spent_s[0]


def _through_fp32(own: Any, spent_s: list[float]) -> Callable[..., Any]:  # own: torch's kernel
    def product(keys: Any, *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            if not any(isinstance(each, Tensor) and each.dtype is torch.bfloat16 for each in args):
                return own.call_boxed(keys, *args, **options)
            wider = {name: _wider(each) for name, each in options.items()}
            return _narrower(own.call_boxed(keys, *map(_wider, args), **wider))
        finally:
            spent_s[0] += time.perf_counter() - begin

    return product


def _wider(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def _narrower(result: Any) -> Any:
    """A product, attention's output and logsumexp, or the gradients of query, key and value."""
    if isinstance(result, Tensor):
        return result.bfloat16()
    output, *rest = result
    if len(rest) == 1:  # attention's logsumexp is fp32 whatever its inputs are
        return output.bfloat16(), *rest
    return tuple(each.bfloat16() for each in result)
