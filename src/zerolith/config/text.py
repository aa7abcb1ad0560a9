"""From a path, base64 text or dict to a plain dict of bounded size. Knows JSON, not keys."""

import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zerolith.config.problems import join, show
from zerolith.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 250_000
_TOO_BIG = f"is larger than {MAX_BYTES} bytes; a config holds settings, not data"
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels; flatten it"
_TOO_MANY = f"holds more than {MAX_VALUES} values; a config holds settings, not data"

# Strings match first, so nothing inside one is taken for a comment. Both patterns run in linear time:
# a string or comment that never closes matches to the end of the text.
_STRING = r'"(?:\\.|[^"\\])*"?'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|#[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_LAST_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)


class _Repeating(dict[str, Any]):
    """A JSON object that writes a key twice; never leaves this file's callers, who refuse it."""

    repeated: str


def read_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A config before its keys are looked at (any JSON), after its name as errors call it.

    Raises ConfigError where the source cannot be read, is too big or is no JSON object.
    """
    if isinstance(source, Mapping):
        return "config", source
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"a config is a dict, a path or base64 JSON text, not {show(source)}")
    if isinstance(source, os.PathLike) or os.path.exists(source):
        name, data = str(Path(source)), _read_file(Path(source))
    else:
        name, data = "base64 config", _read_base64(source)
    return name, _parse(data, name)


def _read_file(path: Path) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device may never end
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ConfigError(f"{path}: is {kind}; give the path of a JSON file")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path (relative to {os.getcwd()})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: cannot be read ({error}); check the path and its permissions") from None


def _read_base64(source: str) -> bytes:
    if len(source) > 2 * MAX_BYTES:
        raise ConfigError(f"base64 config: {_TOO_BIG}")
    try:
        data = base64.b64decode(source + "=" * (-len(source) % 4), altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    if not data.lstrip().startswith(b"{"):
        advice = "parse JSON text into a dict first" if source.lstrip().startswith("{") else "check the path"
        raise ConfigError(f"{show(source)} is neither an existing file nor base64 JSON (both were tried); {advice}")
    return data


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: {_TOO_BIG}")
    try:
        parsed = json.loads(_without_comments(data.decode("utf-8-sig")), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{name}: line {line} column {column} is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ConfigError(f"{name}: {where}: {error.msg}; correct the JSON there") from None
    except RecursionError:
        raise ConfigError(f"{name}: {_TOO_DEEP}") from None
    except ValueError:  # an integer of thousands of digits
        raise ConfigError(f"{name}: holds a number that is too long to read; shorten it") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: holds {show(parsed)}; a config is a JSON object: {{...}}")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        parsed = _Repeating(parsed)
        parsed.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return parsed


def _without_comments(text: str) -> str:
    """Blanks // # and /* */ comments and trailing commas; every other character keeps its line and column.

    Strict JSON stays as it is.
    """

    def blank(match: re.Match[str]) -> str:
        token = match.group()
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return _LAST_COMMA.sub(blank, _COMMENT.sub(blank, text))


_NEVER = ("steps_per_print", math.inf)  # the one key that may be infinite


def flaws(raw: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Values that no key may have: the path of each, and what is wrong. Raises ConfigError beyond the bounds.

    Iterative and counted: a dict that contains itself, or shares its parts, ends at a bound.
    """
    stack: list[tuple[str, int, Any]] = [("", 1, raw)]
    num_values = 0
    while stack:
        path, depth, node = stack.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"{name}: {path[:MAX_DEPTH]!r}... {_TOO_DEEP}")
        if isinstance(node, _Repeating):
            yield join(path, node.repeated), "is written twice in one object; keep one"
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            num_values += 1
            if num_values > MAX_VALUES:
                raise ConfigError(f"{name}: {_TOO_MANY}")
            inner = join(path, key if isinstance(key, str) else show(key))
            if isinstance(node, Mapping) and not isinstance(key, str):
                yield inner, f"is a key of type {type(key).__name__}; keys are strings"
            elif isinstance(value, (Mapping, list, tuple)):
                stack.append((inner, depth + 1, value))
            elif isinstance(value, float) and not math.isfinite(value) and (inner, value) != _NEVER:
                yield inner, f"is {value}; give a finite number"
