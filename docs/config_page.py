"""Writes docs/config.md and a page per section into docs/config: `python docs/config_page.py`."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zerolith.config import KEYS, SECTIONS, TYPED_SECTIONS, Fate, Key

DOCS = Path(__file__).parent
TOP = "top_level"  # the page of the keys that are in no section
GUIDES = {  # pages that tell of a section's subject at length
    "optimizer": "optimizers.md",
    "scheduler": "schedules.md",
    "fp16": "numerics.md",
    "bf16": "numerics.md",
    "zero_optimization": "stages.md",
    "activation_checkpointing": "activation_checkpointing.md",
    "checkpoint": "checkpoints.md",
    "tensorboard": "watching.md",
    "csv_monitor": "watching.md",
    "wandb": "watching.md",
    "comms_logger": "watching.md",
    "flops_profiler": "watching.md",
}

_INTRO = """\
# Configuration

A config is a dict, the path of a JSON file (comments and trailing commas are read too) or base64 JSON text.
`zerolith config check FILE` says what each key of a file does, `zerolith config schema` prints a JSON Schema
for editors. This page and those of the sections are made by `python docs/config_page.py`.

Every key has one fate. **implemented**: it acts as described. **hint**: it is accepted and type-checked, and
has no effect, for the reason given. **not supported yet** and **removed upstream**: it is accepted only at a
value that asks for nothing (its default, or `enabled: false`); any other value is an error. An unknown key is
an error that names the nearest known one. In the batch numbers, `train_batch_size` =
`train_micro_batch_size_per_gpu` * `gradient_accumulation_steps` * data-parallel ranks: two of them give the
third, and one batch size alone means one accumulation step.

## Sections
"""
_OTHERS = """
## Sections of DeepSpeed's that do not act

Existing files need not change as long as they ask for nothing there.
"""


def pages() -> dict[str, str]:
    """All pages: path below docs -> markdown."""
    sections = list(dict.fromkeys(path.split(".")[0] if "." in path else "" for path in KEYS))
    acting = [section for section in sections if section in ("", *TYPED_SECTIONS)]
    others = [section for section in sections if section not in acting]
    toctree = "".join(f"config/{_page(section)}\n" for section in [*acting, *others])
    found = {
        "config.md": f"{_INTRO}{_contents(acting)}{_OTHERS}{_contents(others)}\n"
        f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{toctree}```\n"
    }
    return found | {f"config/{_page(section)}.md": _section(section) for section in sections}


def _page(section: str) -> str:
    return section or TOP


def _title(section: str) -> str:
    return f"`{section}`" if section else "Top level"


def _about(section: str) -> str:
    """What a section is for, in a line; for one that does not act, why not."""
    if not section:
        return "Batch numbers, gradients, and what is no section's."
    if section in TYPED_SECTIONS:
        return TYPED_SECTIONS[section]
    first = min(_keys(section), key=lambda key: key.fate is Fate.HINT)  # what is declined says more
    return f"None of its keys acts: {_sentence(first.why)}"


def _keys(section: str) -> list[Key]:
    """Those of a section and of the sections in it; of the top, those in no section."""
    return [key for key in KEYS.values() if (key.path.split(".")[0] if "." in key.path else "") == section]


def _contents(sections: list[str]) -> str:
    """One line per section, with a link."""
    fates = {section: [key.fate for key in _keys(section)] for section in sections}
    rows = (
        [f"[{_title(section)}](config/{_page(section)}.md)", _about(section), _count(fates[section])]
        for section in sections
    )
    return _table(("section", "what it is about", "keys that act"), rows)


def _count(fates: list[Fate]) -> str:
    return f"{fates.count(Fate.IMPLEMENTED)} of {len(fates)}"


def _section(section: str) -> str:
    """The page of one section, and of the sections in it."""
    keys = _keys(section)
    guide = f" [Guide](../{GUIDES[section]})." if section in GUIDES else ""
    text = f"# {_title(section)}\n\n{_about(section)}{guide} [All sections](../config.md).\n"
    for inner in [section] if not section else [path for path in SECTIONS if f"{path}.".startswith(f"{section}.")]:
        acting = [key for key in keys if key.fate is Fate.IMPLEMENTED and _home(key) == inner]
        if acting:
            text += "" if inner == section else f"\n## {_title(inner)}\n\n{_about(inner)}\n"
            text += _table(
                ("key", "type", "default", "meaning"),
                ([_name(key, inner), _type(key.schema), _default(key), _sentence(key.why)] for key in acting),
            )
    text += _defaults(section, keys)
    hints = [key for key in keys if key.fate is Fate.HINT]
    if hints:
        text += "\n## DeepSpeed's keys that have no effect\n\nThey are accepted, and their types are checked.\n"
        text += _table(
            ("key", "type", "default", "why it has none"),
            ([_name(key, section), _type(key.schema), _default(key), _sentence(key.why)] for key in hints),
        )
    declined = [key for key in keys if key.fate in (Fate.LATER, Fate.REMOVED)]
    if declined:
        text += "\n## DeepSpeed's keys that are declined\n\nAny value that asks for something is an error.\n"
        text += _table(
            ("key", "accepted", "fate", "why"),
            ([_name(key, section), _harmless(key), key.fate.value, _sentence(key.why)] for key in declined),
        )
    return text


def _table(titles: tuple[str, ...], rows: Iterator[list[str]]) -> str:
    lines = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _defaults(section: str, keys: list[Key]) -> str:
    """The section as JSON. Nothing where a key has no default."""
    acting = [key for key in keys if key.fate is Fate.IMPLEMENTED]
    if not acting or any(key.required for key in acting):
        return ""
    config: dict[str, Any] = {}
    for key in acting:
        node = config
        *sections, name = key.path.split(".")
        for each in sections:
            node = node.setdefault(each, {})
        node[name] = key.default
    return f"\nWhat it is if nothing is said:\n\n```json\n{json.dumps(config, indent=2)}\n```\n"


def _home(key: Key) -> str:
    return key.path.rpartition(".")[0]


def _name(key: Key, section: str) -> str:
    return f"`{key.path.removeprefix(f'{section}.')}`"


def _sentence(text: str) -> str:
    return re.sub(r"([<|])", r"\\\1", f"{text.rstrip('.')}.")  # markdown would read them as HTML and as a cell's end


def _default(key: Key) -> str:
    if key.required:
        return "required"
    default = int(key.default) if isinstance(key.default, float) and key.default.is_integer() else key.default
    text = json.dumps(default)
    return f"`{text}`" if len(text) < 60 else "long: see the schema" if key.fate is Fate.HINT else "see below"


def _harmless(key: Key) -> str:
    """The values that ask for nothing."""
    if key.is_switch:
        return '`null`, `false`, `{"enabled": false}`'
    null = "" if None in key.schema.get("enum", [None]) else ", `null`"
    return _type(key.schema) + null


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return ", ".join(_type(choice) for choice in schema["anyOf"])
    if schema.get("items"):
        return f"array of {_type(schema['items'])}"
    kinds = schema.get("type", "anything")
    return ", ".join([kinds] if isinstance(kinds, str) else kinds)


def main() -> None:
    """Write the pages, and remove those of sections that are gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS, help="where to write (default: docs)")
    folder = parser.parse_args().folder
    (folder / "config").mkdir(parents=True, exist_ok=True)
    made = {folder / path: text for path, text in pages().items()}
    for old in set((folder / "config").glob("*.md")) - set(made):
        old.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
