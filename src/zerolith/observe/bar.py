"""Log lines by the library rich and, on a terminal, a live bar of steps below them. It needs rich to be imported."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

REDRAW_S = 0.1


class RichHandler(logging.Handler):
    """Writes to stderr; where that is no terminal, lines without control codes and no bar.

    The bar is drawn by whoever steps, not by a thread: processes may be forked at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._rows: dict[object, TaskID] = {}  # by engine
        self._drawn = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            _Rate(),
            _Part(),
            console=self._console,
            expand=True,
            auto_refresh=False,
            redirect_stdout=_is_terminal(sys.stdout),  # to print above the bar; what goes into a file stays there
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record above the bar."""
        try:
            at = time.strftime("%H:%M:%S", time.localtime(record.created))
            level = f"{record.levelname:<7}", f"logging.level.{record.levelname.lower()}"
            self._console.print(Text.assemble((at, "log.time"), " ", level, " ", self.format(record)), soft_wrap=True)
        except Exception:  # as every handler of `logging`: what cannot be printed does not end the training
            self.handleError(record)

    def show(self, engine: object, step: int, *, total: int | None, text: str) -> None:
        """Move an engine's bar to `step`; total: how many there will be, if that is known."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        count = f"step {step}" if total is None or step > total else f"step {step}/{total}"
        if engine not in self._rows:
            self._bar.start()
            self._rows[engine] = self._bar.add_task(count, total=total, completed=step - 1, text=text)
        self._bar.update(self._rows[engine], completed=step, description=count, text=text)
        if time.monotonic() - self._drawn >= REDRAW_S:
            self._bar.refresh()
            self._drawn = time.monotonic()

    def drop(self, engine: object) -> None:
        """Take an engine's bar away."""
        row = self._rows.pop(engine, None)
        if row is not None:
            self._bar.remove_task(row)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back. When the process ends, `logging` calls it, too."""
        if self._rows:
            self._bar.stop()
        self._rows.clear()
        super().close()


class _Rate(ProgressColumn):
    """Steps per second and the time that is left."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> RenderableType:
        speed, left = task.speed, task.time_remaining
        rate = f"{speed:.2f} steps/s" if speed else ""
        return Text(f"{rate}, {timedelta(seconds=round(left))}" if speed and left else rate)


class _Part(ProgressColumn):
    """A bar in the room that is left, where there is an end to it."""

    def __init__(self) -> None:
        super().__init__(Column(ratio=1))
        self._bar = BarColumn(bar_width=None)

    def render(self, task: Task) -> RenderableType:
        return self._bar.render(task) if task.total is not None else ""


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", bool)())
