"""Zerolith trains PyTorch models that do not fit when every rank keeps a whole copy.

engine, optimizer, loader, scheduler = zerolith.initialize(model=model, config="config.json")
loss = engine(x); engine.backward(loss); engine.step()
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerolith import (
        checkpoint as checkpoint,
        checkpointing as checkpointing,
        data as data,
        errors as errors,
        zero as zero,
    )
    from zerolith.comm import init_distributed as init_distributed
    from zerolith.data import RepeatingLoader as RepeatingLoader
    from zerolith.engine import Engine as Engine
    from zerolith.initialize import add_config_arguments as add_config_arguments, initialize as initialize
    from zerolith.status import StepReport as StepReport

__version__ = "0.1.0"

_HOMES = {  # a name that its home does not hold is the home itself
    "Engine": "zerolith.engine",
    "RepeatingLoader": "zerolith.data",
    "StepReport": "zerolith.status",
    "add_config_arguments": "zerolith.initialize",
    "checkpoint": "zerolith.checkpoint",
    "checkpointing": "zerolith.checkpointing",
    "data": "zerolith.data",
    "errors": "zerolith.errors",
    "init_distributed": "zerolith.comm",
    "initialize": "zerolith.initialize",
    "zero": "zerolith.zero",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # a public name, loaded when it is first asked for
    if name not in _HOMES:
        raise AttributeError(f"module 'zerolith' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = globals()[name] = getattr(home, name, home)
    return value


class _Package(ModuleType):
    """Keeps `zerolith.initialize` the function, though importing the module of that name binds it here."""

    def __setattr__(self, name: str, value: object) -> None:
        is_submodule = name == "initialize" and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_submodule else value)


sys.modules[__name__].__class__ = _Package
