"""`zerolith config`: check a file, print the JSON Schema."""

import argparse
import json
from pathlib import Path
from typing import Any

from zerolith.cli.schedule_commands import make_named
from zerolith.config import KEYS, SECTIONS, TYPED_SECTIONS, Fate, Key, load_config, resolve_batch


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `config` and its subcommands."""
    config = commands.add_parser("config", help="check and explain configs")
    subcommands = config.add_subparsers(metavar="SUBCOMMAND", required=True)
    check = subcommands.add_parser("check", help="say what each key of a file does")
    check.add_argument("file", metavar="FILE", help="JSON file")
    check.add_argument("--world-size", type=int, metavar="N", help="ranks; resolves batch sizes")
    check.set_defaults(run=_check)
    schema = subcommands.add_parser("schema", help="print a JSON Schema for editors")
    schema.set_defaults(run=_print_schema)


def _print_schema(arguments: argparse.Namespace) -> int:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zerolith config"}
    print(json.dumps(head | _section_schema(""), indent=2))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    given = load_config(Path(arguments.file))
    resolved = given if arguments.world_size is None else resolve_batch(given, arguments.world_size)
    if given.optimizer is not None or given.scheduler is not None:  # torch takes long to import
        make_named(given)
    dumps = given.model_dump(exclude_unset=True), given.model_dump(), resolved.model_dump()
    for key in KEYS.values():
        if key.fate is Fate.IMPLEMENTED:
            set_by_file, before, after = (_lookup(dump, key.path) for dump in dumps)
            origin = "derived" if after != before else "default" if set_by_file is _MISSING else "implemented"
            print(f"{origin:<12} {key.path} = {json.dumps(None if after is _MISSING else after)}")
    for note in given.notes:
        print(f"{'hint':<12} {note.path}: {note.why}")
    return 0


_MISSING = object()


def _lookup(dump: object, path: str) -> object:
    for name in path.split("."):
        dump = dump.get(name, _MISSING) if isinstance(dump, dict) else _MISSING
    return dump


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
    described = key.why if key.fate is Fate.IMPLEMENTED else f"{key.fate.value.capitalize()}: {key.why}."
    default: dict[str, Any] = {} if key.required else {"default": key.default}
    return {"description": described, **key.schema, **default}
