"""A signal that says that this job will be killed soon: remembered until the step at hand is done."""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from typing import Any

from zerolith.errors import UsageError

logger = logging.getLogger("zerolith")

TOO_LATE = 124  # exit status when the deadline passes first, as timeout(1) has it
NO_DESCRIPTOR = -1


class Preemption:
    """Remembers the first SIGTERM. A second one, or the deadline, ends the process at once.

    Python calls its handler only when the main thread comes back from what it does, and a collective that waits for a
    rank that hangs does not; so a thread listens, too, to the pipe into which the interpreter writes every signal.
    Raises UsageError if it is made in another thread than the main one, where Python takes no handlers.
    """

    def __init__(self, *, deadline_s: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("checkpoint.preemption: signals can be caught by the main thread only; initialize there")
        self.requested = False
        self._deadline_s = deadline_s
        self._timer: threading.Timer | None = None
        self._turn = threading.RLock()  # the handler may interrupt itself
        self._heard = {"handler": 0, "pipe": 0}  # signals; each comes both ways
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._earlier: Any = signal.signal(signal.SIGTERM, self._on_signal)  # a function, a number or None
        self._earlier_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if self._earlier_pipe != NO_DESCRIPTOR:  # an event loop's, which needs it more
            signal.set_wakeup_fd(self._earlier_pipe)
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="zerolith SIGTERM", daemon=True).start()
        _ACTIVE.add(self)

    def remove(self) -> None:
        """Put back the handler that was there before."""
        if self._timer is not None:
            self._timer.cancel()
        if self in _ACTIVE:
            _ACTIVE.discard(self)
            signal.signal(signal.SIGTERM, self._earlier if self._earlier is not None else signal.SIG_DFL)
            if self._earlier_pipe == NO_DESCRIPTOR:
                signal.set_wakeup_fd(NO_DESCRIPTOR)
            os.close(self._pipe[1])  # which ends the thread

    def _on_signal(self, number: int, frame: object) -> None:
        self._hear("handler")

    def _listen(self, reader: int) -> None:
        while told := os.read(reader, 1):
            if told[0] == signal.SIGTERM:
                self._hear("pipe")
        os.close(reader)

    def _hear(self, way: str) -> None:
        with self._turn:
            known = max(self._heard.values())
            self._heard[way] += 1
            if self._heard[way] <= known:
                return  # it has come the other way before
            if self.requested:
                os._exit(128 + signal.SIGTERM)
            self.requested = True
            self._timer = threading.Timer(self._deadline_s, self._too_late)
            self._timer.daemon = True
            self._timer.start()

    def _too_late(self) -> None:
        logger.error("no checkpoint was committed within %g s after SIGTERM; the process ends", self._deadline_s)
        logging.shutdown()
        os._exit(TOO_LATE)


_ACTIVE: weakref.WeakSet[Preemption] = weakref.WeakSet()


def _remove_in_child() -> None:
    """Workers that this process forks end by SIGTERM as ever, and do not write into its pipe."""
    for preemption in [*_ACTIVE]:
        preemption.remove()


os.register_at_fork(after_in_child=_remove_in_child)
