"""How a config error reads: dotted path, what is wrong, what to do, on one line of bounded length."""

from collections.abc import Callable

from zerolith.errors import ConfigError

LISTED = 5
MAX_SHOWN_CHARS = 60
MAX_PATH_CHARS = 160


def show(value: object) -> str:
    """A value as an error names it: short whatever it holds, however deep it is."""
    if isinstance(value, str):
        text = repr(value[: MAX_SHOWN_CHARS + 1])
        return text if len(value) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "...'"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"


def join(section: str, name: str) -> str:
    """The dotted path of a key."""
    return f"{section}.{name}" if section else name


def _printable(path: str) -> str:
    if len(path) > MAX_PATH_CHARS:
        path = path[:MAX_PATH_CHARS] + "..."
    return path if path.isprintable() and path.strip() == path != "" else repr(path)


class Problems:
    """What is wrong with one config: the first five in words, all of them counted."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._texts: list[str] = []
        self._num_problems = 0

    def add(self, path: str, what: str | Callable[[], str]) -> None:
        """Record a problem; `what` may be a function, called only if its text will be shown."""
        self._num_problems += 1
        if len(self._texts) < LISTED:
            self._texts.append(f"{_printable(path)} {what if isinstance(what, str) else what()}")

    def raise_if_any(self) -> None:
        """Raises ConfigError that names every problem, or the first five and a count."""
        if self._num_problems:
            rest = self._num_problems - len(self._texts)
            more = f"; and {rest} more problem{'s' if rest > 1 else ''}" if rest else ""
            raise ConfigError(f"{_printable(self._source)}: {'; '.join(self._texts)}{more}")
