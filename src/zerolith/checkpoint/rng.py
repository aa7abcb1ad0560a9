"""The random-number generators of a process: Python's, NumPy's if it is used, torch's, and the GPU's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """Values and tensors that `set_rng_state` takes."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, torch.tensor(words, dtype=torch.int64), gauss]}
    state["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached]
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where the process of `rng_state` was; generators that it lacks are left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
