"""Making torch's optimizers without torch's compiler, which they import (1.5 s, 70 MB) only to keep it out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

DONE = "__dynamo_disable"  # where torch keeps, on such a function, the form that the compiler leaves alone


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within, `Optimizer.add_param_group` runs as it is: nothing is compiled before torch's compiler is imported.

    Afterwards all is as before, so whoever compiles later finds torch's own protection in place.
    """
    plain = getattr(Optimizer.add_param_group, "__wrapped__", None)
    if plain is None or hasattr(plain, DONE) or "torch._dynamo" in sys.modules:
        yield
        return
    setattr(plain, DONE, plain)
    try:
        yield
    finally:
        delattr(plain, DONE)
