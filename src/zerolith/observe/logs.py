"""What rank 0 says of an engine, and in which form.

[Note: one handler] The library installs nothing at import and nothing for the form "plain": its records go where the
application's own set-up of `logging` sends them. For "json" and "rich" the logger `zerolith` has one handler as long as
there is an engine that wants it, however many they are; if they differ, in the form of the latest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from zerolith.comm import Comm
from zerolith.config import Config
from zerolith.errors import ConfigError
from zerolith.observe.json_lines import JsonFormatter

if TYPE_CHECKING:
    from zerolith.observe.bar import RichHandler

logger = logging.getLogger("zerolith")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """What an engine knows of an optimizer step when it is done."""

    step: int  # counted from 1
    lr: list[float]  # of each param group, as the step used it
    grad_norm: float
    loss_scale: float
    skipped_steps: int  # so far
    samples: int  # trained on so far


class Logs:
    """One engine's share in what is printed; does nothing on other ranks than the first.

    Raises ConfigError where the form needs a library that is not installed.
    """

    def __init__(self, config: Config, comm: Comm) -> None:
        is_first = comm.rank == 0
        self.form = config.zerolith.log_format if is_first else "plain"
        self._every = config.steps_per_print if is_first else None
        self._total = _total_steps(config)
        if self.form != "plain":
            OUTPUT.enter(self)

    @property
    def shows_loss(self) -> bool:
        return self.form == "rich" or (self.form != "plain" and self._every is not None)

    def is_due(self, step: int) -> bool:
        """Whether `stepped` does anything with the numbers of this step."""
        return self.form == "rich" or (self._every is not None and step % self._every == 0)

    def stepped(self, numbers: StepNumbers, found: Mapping[str, float]) -> None:
        """Log a line every steps_per_print steps, with all numbers as its attribute `numbers`; move the bar if any."""
        if not self.is_due(numbers.step):
            return
        rates = ", ".join(f"{lr:.3g}" for lr in numbers.lr)
        text = f"lr {rates}, grad norm {numbers.grad_norm:.4g}"
        if self.form != "plain" and "loss" in found:
            text = f"loss {found['loss']:.4g}, {text}"
        if self.form == "rich" and OUTPUT.bar is not None:
            OUTPUT.bar.show(self, numbers.step, total=self._total, text=text)
        if self._every is not None and numbers.step % self._every == 0:
            line = f"step {numbers.step}: {text}, skipped {numbers.skipped_steps}"
            logger.info("%s", line, extra={"numbers": {**asdict(numbers), **found}})

    def remove(self) -> None:
        """The engine goes."""
        OUTPUT.leave(self)


class _Output:
    """The handler on the logger and the engines that want it. See [Note: one handler]."""

    def __init__(self) -> None:
        self.bar: RichHandler | None = None  # the handler, where it has bars
        self._handler: logging.Handler | None = None
        self._form = "plain"
        self._engines: list[Logs] = []
        self._gave_level = False  # the logger has its level from here

    def enter(self, engine: Logs) -> None:
        self._change_to(engine.form)
        self._engines.append(engine)

    def leave(self, engine: Logs) -> None:
        if engine in self._engines:
            self._engines.remove(engine)
            self._change_to(self._engines[-1].form if self._engines else "plain")
            if self.bar is not None:
                self.bar.drop(engine)

    def _change_to(self, form: str) -> None:
        if form == self._form:
            return
        bar = _rich_handler() if form == "rich" else None
        handler = _json_handler() if form == "json" else bar
        if self._handler is not None:
            logger.removeHandler(self._handler)
            self._handler.close()
        if handler is not None:
            logger.addHandler(handler)
        self._form, self._handler, self.bar = form, handler, bar
        self._set_level()

    def _set_level(self) -> None:
        """Let INFO through where the application says nothing of this logger; take that back at the end."""
        if self._handler is not None:
            if logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):
                logger.setLevel(logging.INFO)
                self._gave_level = True
        elif self._gave_level:
            if logger.level == logging.INFO:
                logger.setLevel(logging.NOTSET)
            self._gave_level = False


OUTPUT = _Output()  # one for the process, as the logger is


def _json_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    return handler


def _rich_handler() -> RichHandler:
    try:
        from zerolith.observe.bar import RichHandler
    except ImportError as error:
        raise ConfigError("zerolith.log_format: rich is not installed; pip install 'zerolith[rich]'") from error
    return RichHandler()


def _total_steps(config: Config) -> int | None:
    total = config.scheduler.params.get("total_num_steps") if config.scheduler is not None else None
    return int(total) if isinstance(total, int | float) and total > 0 else None
