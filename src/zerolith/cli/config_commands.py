"""`zerolith config`: check a file, print the JSON Schema, print the page of all keys."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerolith.config import KEYS, SECTIONS, TYPED_SECTIONS, Fate, Key, load_config, resolve_batch

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_INTRO = """\
# Configuration

A config is a dict, the path of a JSON file (comments and trailing commas are read too) or base64 JSON text.
`zerolith config check FILE` says what each key of a file does, `zerolith config schema` prints a JSON Schema
for editors, and `zerolith config docs` prints this page.

Every key has one fate. **implemented**: it acts as described. **hint**: it is accepted and type-checked, and
has no effect, for the reason given. **not supported yet** and **removed upstream**: it is accepted only at a
value that asks for nothing (its default, or `enabled: false`); any other value is an error. An unknown key is
an error that names the nearest known one. In the batch numbers, `train_batch_size` =
`train_micro_batch_size_per_gpu` * `gradient_accumulation_steps` * data-parallel ranks: two of them give the
third, and one batch size alone means one accumulation step.
"""


def add_commands(commands: "Commands") -> None:
    """Add `config` and its subcommands."""
    config = commands.add_parser("config", help="check and explain configs")
    subcommands = config.add_subparsers(metavar="SUBCOMMAND", required=True)
    check = subcommands.add_parser("check", help="say what each key of a file does")
    check.add_argument("file", metavar="FILE", help="JSON file")
    check.add_argument("--world-size", type=int, metavar="N", help="ranks; resolves batch sizes")
    check.set_defaults(run=_check)
    schema = subcommands.add_parser("schema", help="print a JSON Schema for editors")
    schema.set_defaults(run=lambda _: _print(schema_text()))
    docs = subcommands.add_parser("docs", help="print the page of all keys")
    docs.set_defaults(run=lambda _: _print(docs_text()))


def _print(text: str) -> int:
    print(text, end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    config = load_config(Path(arguments.file))
    given = config
    if arguments.world_size is not None:
        config = resolve_batch(config, arguments.world_size)
    set_by_file, before, after = given.model_dump(exclude_unset=True), given.model_dump(), config.model_dump()
    for key in KEYS.values():
        if key.fate is Fate.IMPLEMENTED:
            value = _lookup(after, key.path)
            origin = "implemented" if _lookup(set_by_file, key.path) is not _MISSING else "default"
            if value != _lookup(before, key.path):
                origin = "derived"
            print(f"{origin:<12} {key.path} = {json.dumps(None if value is _MISSING else value)}")
    for note in config.notes:
        print(f"{'hint':<12} {note.path}: {note.why}")
    return 0


_MISSING = object()


def _lookup(dump: object, path: str) -> object:
    for name in path.split("."):
        dump = dump.get(name, _MISSING) if isinstance(dump, dict) else _MISSING
    return dump


def schema_text() -> str:
    """JSON Schema of what a config may hold."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zerolith config"}
    return json.dumps(head | _section_schema(""), indent=2) + "\n"


def _section_schema(section: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name in SECTIONS[section]:
        path = f"{section}.{name}" if section else name
        properties[name] = _section_schema(path) if path in SECTIONS else _key_schema(KEYS[path])
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if section:
        schema["type"] = ["object", "null"] + (["boolean"] if section == "zero_optimization" else [])
        schema["description"] = TYPED_SECTIONS.get(section, "Nothing here has an effect.")
        schema["required"] = [name for name in properties if name == "type"]
    else:
        properties["bfloat16"] = properties["bf16"]
    return schema


def _key_schema(key: Key) -> dict[str, Any]:
    implemented = key.fate is Fate.IMPLEMENTED
    described = key.why if implemented else f"{key.fate.value.capitalize()}: {key.why}."
    default: dict[str, Any] = {} if key.required else {"default": key.default}
    return {"description": described, **key.schema, **default}


def docs_text() -> str:
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
