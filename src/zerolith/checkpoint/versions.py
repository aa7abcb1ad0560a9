"""Which versions of what have written a checkpoint."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch


@functools.cache
def libraries() -> dict[str, str]:
    """Versions by name."""
    try:
        own = importlib.metadata.version("zerolith")
    except importlib.metadata.PackageNotFoundError:  # used from a folder, not installed
        own = "unknown"
    return {"zerolith": own, "torch": torch.__version__, "python": platform.python_version()}
