"""A signal that says that this job will be killed soon: remembered until the step at hand is done."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from zerolith.errors import UsageError

logger = logging.getLogger("zerolith")

TOO_LATE = 124  # exit status when the deadline passes first, as timeout(1) has it


class Preemption:
    """Remembers the first SIGTERM. A second one, or the deadline, ends the process at once.

    Raises UsageError if it is made in another thread than the main one, where Python takes no handlers.
    """

    def __init__(self, *, deadline_s: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("checkpoint.preemption: signals can be caught by the main thread only; initialize there")
        self.requested = False
        self._deadline_s = deadline_s
        self._timer: threading.Timer | None = None
        self._earlier: Any = signal.signal(signal.SIGTERM, self._on_signal)  # a function, a number or None

    def remove(self) -> None:
        """Put back the handler that was there before."""
        if self._timer is not None:
            self._timer.cancel()
        signal.signal(signal.SIGTERM, self._earlier if self._earlier is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        self._timer = threading.Timer(self._deadline_s, self._too_late)
        self._timer.daemon = True
        self._timer.start()

    def _too_late(self) -> None:
        logger.error("no checkpoint was committed within %g s after SIGTERM; the process ends", self._deadline_s)
        logging.shutdown()
        os._exit(TOO_LATE)
