"""Prints docs/config.md, the page of all keys: `python docs/config_page.py > docs/config.md`."""

import json
from collections.abc import Mapping
from typing import Any

from zerolith.config import KEYS, SECTIONS, TYPED_SECTIONS, Fate, Key

_INTRO = """\
# Configuration

A config is a dict, the path of a JSON file (comments and trailing commas are read too) or base64 JSON text.
`zerolith config check FILE` says what each key of a file does, `zerolith config schema` prints a JSON Schema
for editors. This page is made by `python docs/config_page.py`.

Every key has one fate. **implemented**: it acts as described. **hint**: it is accepted and type-checked, and
has no effect, for the reason given. **not supported yet** and **removed upstream**: it is accepted only at a
value that asks for nothing (its default, or `enabled: false`); any other value is an error. An unknown key is
an error that names the nearest known one. In the batch numbers, `train_batch_size` =
`train_micro_batch_size_per_gpu` * `gradient_accumulation_steps` * data-parallel ranks: two of them give the
third, and one batch size alone means one accumulation step.
"""


def page() -> str:
    """The markdown page of all keys: one table per section."""
    return _INTRO + "".join(_table(section) for section in SECTIONS)


def _table(section: str) -> str:
    keys = [key for key in KEYS.values() if key.path.rpartition(".")[0] == section]
    if not keys:
        return ""
    keys.sort(key=lambda key: list(Fate).index(key.fate))
    rows = "".join(
        f"| `{key.path.rpartition('.')[2]}` | {_type(key.schema)} | {_default(key)} | {key.fate.value} "
        f"| {key.why.rstrip('.')}. |\n"
        for key in keys
    )
    title = f"`{section}`" if section else "Top level"
    about = f"{TYPED_SECTIONS[section]}\n\n" if section in TYPED_SECTIONS else ""
    return f"\n## {title}\n\n{about}| key | type | default | fate | meaning |\n|---|---|---|---|---|\n{rows}"


def _default(key: Key) -> str:
    if key.required:
        return "required"
    default = int(key.default) if isinstance(key.default, float) and key.default.is_integer() else key.default
    text = json.dumps(default)
    return f"`{text}`" if len(text) < 60 else "see the schema"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return ", ".join(_type(choice) for choice in schema["anyOf"])
    if schema.get("items"):
        return f"array of {_type(schema['items'])}"
    kinds = schema.get("type", "anything")
    return ", ".join([kinds] if isinstance(kinds, str) else kinds)


if __name__ == "__main__":
    print(page(), end="")
