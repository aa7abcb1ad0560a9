"""Putting something around a module's forward and taking it off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Forward:
    """A module whose forward was replaced by `wrap(forward)`, until `remove`. Its hooks stay outside.

    The last one put on is the first to be removed.
    """

    def __init__(self, module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.module = module
        self._before = module.__dict__.get("forward")
        module.forward = wrap(module.forward)  # an attribute of this instance

    def remove(self) -> None:
        """Give the module back the forward that it had."""
        if self._before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._before
