"""From what the user gave to a checked `Config`: every key meets its fate here, every error is one line."""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from zerolith.config.keys import ALIASES, KEYS, NAMED_SECTIONS, SECTIONS, TYPED_SECTIONS, Fate, Key, suggest
from zerolith.config.problems import Problems, join, show
from zerolith.config.schema import Config, Note
from zerolith.config.text import flaws, read_source

AUTO = "auto"


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], *, allow_auto: bool = False) -> Config:
    """Read a dict, a JSON file or base64 JSON text.

    `allow_auto` takes "auto" as "the default" (clients send it before they fill it in). The batch numbers
    stay as given until `resolve_batch`. Raises ConfigError that names each key at fault.
    """
    name, raw = read_source(source)
    problems = Problems(name)
    for flaw in flaws(raw, name):
        problems.add(*flaw)
    problems.raise_if_any()
    sieve = _Sieve(problems, allow_auto=allow_auto)
    fields = sieve.section(raw, "")
    try:
        config = Config.model_validate(fields, context=(raw, tuple(sieve.notes)))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _explain(problems, detail)
    problems.raise_if_any()
    return config


def _explain(problems: Problems, detail: Mapping[str, Any]) -> None:
    """Record one pydantic error (Any: its `input` is whatever the user wrote)."""
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "value_error":  # a rule over several keys, whose text names them
        problems.add(*str(detail["ctx"]["error"]).split(" ", 1))
    elif detail["type"] == "missing":
        problems.add(path, "is required; add it or leave its section out")
    else:
        problems.add(path, f"{detail['msg'].replace('Input should', 'must')}, not {show(detail['input'])}")


class _Sieve:
    """Lets implemented keys through to the schema; notes hints; reports the rest."""

    def __init__(self, problems: Problems, *, allow_auto: bool) -> None:
        self.notes: list[Note] = []
        self._problems = problems
        self._allow_auto = allow_auto

    def section(self, node: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The keys of one section that the schema reads."""
        kept: dict[str, Any] = {}
        for name, value in node.items():
            given = join(path, name)
            known = ALIASES.get(given, given)
            leaf = known.rpartition(".")[2]
            if leaf != name and leaf in node:
                self._problems.add(given, f"is another name of {known!r}, which is set too; keep one")
            elif (known not in KEYS and known not in SECTIONS) or "." in name or not name:
                self._unknown(path, name)
            elif self._is_auto(known, value):
                self._auto(known)
            elif known in SECTIONS:
                self._enter(known, value, kept)
            elif KEYS[known].fate is Fate.IMPLEMENTED:
                kept[leaf] = self._params(known, value) if leaf == "params" else value
            else:
                self._decide(KEYS[known], value)
        return kept

    def _enter(self, path: str, value: object, kept: dict[str, Any]) -> None:
        if path == "zero_optimization" and isinstance(value, bool):
            self.notes.append(Note(path, f"the bool form is deprecated; write {{'stage': {int(value)}}}"))
            value = {"stage": int(value)}
        if isinstance(value, Mapping):
            inner = self.section(value, path)
            unnamed = path in NAMED_SECTIONS and _text(value.get("type")) == AUTO
            if path in TYPED_SECTIONS and not unnamed:
                kept[path.rpartition(".")[2]] = inner
        elif value is not None:
            self._problems.add(path, f"must be an object with keys such as {SECTIONS[path][0]!r}, not {show(value)}")

    def _decide(self, key: Key, value: object) -> None:
        if not key.admits(value):
            self._problems.add(key.path, _refusal(key, value))
        elif key.fate is Fate.HINT:
            self.notes.append(Note(key.path, key.why))

    def _params(self, path: str, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        for name, inner in value.items():
            if _text(inner) == AUTO:
                self._auto(join(path, name))
        return {name: inner for name, inner in value.items() if _text(inner) != AUTO}

    def _unknown(self, section: str, name: str) -> None:
        if not section and name in KEYS:
            home, _, leaf = name.rpartition(".")
            why = f"a dotted name sets nothing; write {leaf!r} inside {home!r}"
            self.notes.append(Note(name, why, is_mistake=True))
            return
        where = "is not a known key" + (f" of {section!r}" if section else "")
        self._problems.add(join(section, name), lambda: f"{where}; {suggest(section, name)}")

    def _is_auto(self, path: str, value: object) -> bool:
        if _text(value) != AUTO:
            return False
        key = KEYS.get(path)
        return key is None or (key.schema != {} and AUTO not in key.schema.get("enum", ()))

    def _auto(self, path: str) -> None:
        if not self._allow_auto:
            self._problems.add(path, "is still 'auto', which clients fill in; write a value or leave it out")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _refusal(key: Key, value: object) -> str:
    values = [show(value) for value in key.schema.get("enum", ()) if value is not None]
    if key.fate is Fate.HINT:
        expected = f"one of {', '.join(values)}" if values else f"of type {' or '.join(key.kinds)}"
        return f"must be {expected}, not {show(value)}"
    state = "is not supported yet" if key.fate is Fate.LATER else "asks for a feature that DeepSpeed removed"
    remedy = f"use {values[0]} or leave it out" if values else "leave it out"
    return f"= {show(value)} {state} ({key.why}); {remedy}"
