"""The end of an engine: the model and the client's optimizer are left to themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable
from threading import Thread
from typing import Any

from zerolith.optim import PartitionedOptimizer
from zerolith.sharded_model import ShardedModel
from zerolith.zero.owners import forget

PATIENCE_S = 5.0


def let_go_aside(
    sharded: ShardedModel, partitioned: PartitionedOptimizer | None, handles: Iterable[Any], pid: int
) -> None:
    """For an engine that is dropped without destroy().

    The collector may be the one who drops it, on any thread and in the midst of anything: so what has to be waited for
    is waited for on a thread of its own, and only for so long.
    """
    if os.getpid() != pid:
        return  # nor can the child be trusted to start threads
    aside = Thread(target=let_go, args=(sharded, partitioned, handles, pid), name="zerolith end")
    aside.start()
    aside.join(PATIENCE_S)


def let_go(sharded: ShardedModel, partitioned: PartitionedOptimizer | None, handles: Iterable[Any], pid: int) -> None:
    """Take away all that the engine has added, and give its memory back; the model keeps its weights."""
    if os.getpid() != pid:
        return  # a child that this process has forked: threads and files are its parent's
    for handle in handles:
        handle.remove()
    forget(sharded)
    if partitioned is not None:
        partitioned.let_go()
    sharded.reducer.remove_hooks()
    if not any(section.is_sharded for section in sharded.sections):
        sharded.detach()  # else forward hooks stay: they make the model whole where it is used
    sharded.residency.close()
    sharded.drop_memory()
    sharded.gradients.clear()
    sharded.reducer.gradients.clear()
    for section in sharded.sections:
        section.grads = section.main = None
        section.masters.clear()
