"""Updates that run behind the forward that follows them, a section at a time, in a thread of their own.

[Note: behind] From `start` to `settle` a section belongs to that thread: masters, states, gradients, weights at rest.
Everyone else comes to these through Section.resident, Section.near and what a stand-in holds, which settle it first. So
a forward waits for a unit's update just before it gathers the unit, while those of later units go on. All that decides
the update, gradient norm and options included, is known before it starts: the bits are those of a step that waits.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerolith.errors import OffloadError, UsageError
from zerolith.gradients import Gradients
from zerolith.member import Granularity
from zerolith.memory.threads import helpers, start_task
from zerolith.partitioning import SHARD

logger = logging.getLogger("zerolith")

KNOWN = ("torch", "zerolith")  # whose optimizers keep nothing but groups and states from step to step


class Behind:
    """Owner of the thread, and of the gradients that it has not used yet."""

    def __init__(self, device: torch.device) -> None:
        self._error: OffloadError | None = None  # the first, until someone takes it
        self._failed: Exception | None = None  # after which no update of the same step is begun
        self._device = device
        self._pid = os.getpid()
        self._stream: torch.cuda.Stream | None = None  # beside the one that computes
        self._thread: ThreadPoolExecutor | None = None
        self._tasks: dict[Gradients, Future[None]] = {}
        self._ident = 0  # of the thread, while it updates

    def start(self, updates: Mapping[Gradients, Callable[[], None]], *, keeps: bool = False) -> None:
        """Begin to make the calls, each of which updates the masters and weights of one section, in order.

        The memory of its gradient goes then, unless it `keeps`. After one that has failed none is made, until all are
        settled.
        """
        self._thread = self._thread or helpers(1, "zerolith optimizer")
        self._failed = self._failed if self._tasks else None
        ready = None
        if self._device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(self._device)
            ready = torch.cuda.current_stream(self._device).record_event()
        for own, update in updates.items():
            own.is_held = True
            own.section.settle = partial(self.settle, own)
            self._tasks[own] = start_task(self._thread, partial(self._run, own, update, ready, keeps))

    def wait_for_room(self, most: int) -> None:
        """Wait until fewer than `most` updates are under way: their gradients are kept until then."""
        under_way = [task for task in self._tasks.values() if not task.done()]
        wait(under_way[: len(under_way) - most + 1] if len(under_way) >= most else [])

    def settle(self, own: Gradients) -> None:
        """Wait for a section's update, if it has one. Its error is kept: no rank may leave the others alone in here.

        Raises UsageError in a child that was forked in the meantime: the thread is its parent's.
        """
        if own not in self._tasks or self._ident == threading.get_ident():
            return
        if os.getpid() != self._pid:
            raise UsageError("this process was forked while weights were being updated; fork it before the step")
        wait([self._tasks[own]])
        own.section.settle = lambda: None
        own.section.failure = self._tasks.pop(own).exception()
        if own.section.failure is not None:
            self.report(self._failed or own.section.failure)  # others were not begun because of it
        own.is_held = False
        if not own.section.is_ahead:  # else the step that it belongs to asks what the gradient was
            own.reset()

    def settle_all(self) -> None:
        """Wait for all updates."""
        for own in list(self._tasks):
            self.settle(own)

    def report(self, error: BaseException) -> None:
        """Keep it, unless there was one before, until someone takes it."""
        if not isinstance(error, OffloadError):
            wrapped = OffloadError(f"{type(error).__name__} in an update: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._error = self._error or error

    def take_error(self) -> OffloadError | None:
        """What went wrong since this was last asked."""
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait for all updates, and let the thread go."""
        self.settle_all()
        if self._thread is not None:
            self._thread.shutdown()
        if self._error is not None:
            logger.error("the last step failed, and weights are not those that it should have made: %s", self._error)

    @torch.no_grad()
    def _run(self, own: Gradients, update: Callable[[], None], ready: torch.cuda.Event | None, keeps: bool) -> None:
        if self._failed is not None:
            raise OffloadError("an earlier update failed") from self._failed
        self._ident = threading.get_ident()
        try:
            with ExitStack() as beside:
                if self._stream is not None and ready is not None:
                    torch.cuda.set_device(self._device)  # a thread begins with the first, and would go back to it
                    beside.enter_context(torch.cuda.stream(self._stream))
                    self._stream.wait_event(ready)
                    beside.callback(self._stream.synchronize)
                update()
            if not keeps:
                own.free()
        except Exception as error:
            self._failed = error
            raise
        finally:
            self._ident = 0


def is_known(inner: Optimizer) -> bool:
    """Whether all that `inner` keeps from step to step is in its groups and states."""
    return type(inner).__module__.partition(".")[0] in KNOWN


def can_run_behind(inner: Optimizer, own: Gradients) -> bool:
    """Whether `inner` may step a section while others compute: nobody can see its weights before they are new."""
    section = own.section
    is_offloaded = section.master_device is not None
    return is_offloaded and section.is_sharded and section.main is not None and _steps_alone(inner, own)


def can_run_ahead(inner: Optimizer, own: Gradients, *, is_swapped: bool) -> bool:
    """Whether `inner` may step a section in backward: nobody can see its weights then, or they stay until the step."""
    section = own.section
    if not _steps_alone(inner, own) or own.partitioning.optim is not SHARD or section.main is None:
        return False
    return section.is_sharded or not (is_swapped or section.main.shares_memory_with(section.weights))


def _steps_alone(inner: Optimizer, own: Gradients) -> bool:
    """Whether a section may be stepped apart from others, by an object that is not `inner` but like it."""
    return is_known(inner) and own.section.granularity is Granularity.ELEMENT


def has_hooks(inner: Optimizer, *, but: Any) -> bool:
    """Whether someone is called before or after each step, the hook with the handle `but` left out."""
    return bool(inner._optimizer_step_pre_hooks.keys() - {but.id}) or bool(inner._optimizer_step_post_hooks)


def options_of(inner: Optimizer) -> list[dict[str, Any]]:
    """Every group's options as they are now: a scheduler may change them while the update runs."""
    return [
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in inner.param_groups
    ]


def alike(inner: Optimizer, options: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]]) -> Optimizer:
    """An optimizer that shares the states of `inner` and has groups of its own, without its hooks."""
    other: Optimizer = object.__new__(type(inner))
    other.__dict__.update(inner.__dict__)
    other.__dict__.pop("step", None)  # a scheduler's, which would step `inner`
    other._optimizer_step_pre_hooks, other._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    other.param_groups = [{**group, "params": [*given]} for group, given in zip(options, params, strict=True)]
    return other
