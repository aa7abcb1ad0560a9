"""What Triton makes of the kernels for a GPU, which need not be there: each operation rounds once, and none flushes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from zerolith.kernels.recipe import NUM_STATES, Kind

triton = pytest.importorskip("triton", reason="needs Triton")
GRADS = ("*fp32", "*bf16", "*fp16")
ARITHMETIC = re.compile(r"\b((?:fma|mad|mul|add|sub|div|sqrt|rcp|ex2)\.[a-z.]*f(?:32|64))\b")


def operations(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> set[str]:
    """The floating-point instructions of a kernel compiled for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zerolith.kernels.triton_kernels import EXACT

    source = ASTSource(fn=kernel, signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=EXACT)
    return set(ARITHMETIC.findall(compiled.asm["ptx"]))


def assert_exact(found: set[str]) -> None:
    assert found
    wrong = {each for each in found if each.startswith(("fma", "mad", "rcp")) or "ftz" in each or "approx" in each}
    assert not wrong, f"not as the recipe says: {wrong}"


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("has_out", [False, True])
def test_updates(kind: Kind, is_split: bool, has_out: bool) -> None:
    from zerolith.kernels import triton_kernels as kernels

    for grads in GRADS:
        types = dict.fromkeys(kernels._update.arg_names, "fp32")
        types |= {"grads": grads, "firsts": "*fp32", "seconds": "*fp32", "numel": "i32"}
        types |= {"masters": "*bf16", "remainders": "*i16"} if is_split else {"masters": "*fp32", "remainders": "*fp32"}
        types |= {"outs": "*bf16" if has_out else "*fp32"}
        constants = {
            "KIND": int(kind), "STATES": NUM_STATES[kind], "DECAYS": True, "IS_FIRST": False, "NESTEROV": True,
            "IS_SPLIT": is_split, "HAS_OUT": has_out, "TILE": kernels.TILE,
        }  # fmt: skip
        assert_exact(operations(kernels._update, types, constants))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("values", GRADS)
def test_sums(adds: bool, squares: bool, values: str) -> None:
    from zerolith.kernels import triton_kernels as kernels

    types = {"values": values, "targets": "*fp32", "squares": "*fp64", "numel": "i32"}
    constants = {
        "WRITES": True, "ADDS": adds, "SQUARES": squares, "BLOCKS": kernels.TILE_BLOCKS, "LANES": kernels.LANES
    }  # fmt: skip
    found = operations(kernels._sums, types, constants)
    assert bool(found) == (adds or squares)
    if found:
        assert_exact(found)
