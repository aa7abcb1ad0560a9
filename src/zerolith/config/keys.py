"""Every key that a config may hold, with its fate: the schema's fields and DeepSpeed's table, indexed.

deepspeed.json lists the keys that zerolith does not act on, in groups that share a section, a fate and its reason. A
name may be dotted. A key's value is its default, whose type is its type (5 takes integers, 5.0 any number), or one of

    {}                           any value
    {"type": T}                  null or a value of JSON type T
    {"one_of": [DEFAULT, ...]}   these values only
    {"switch": true}             an object whose inside is not ours: it asks for something unless empty or disabled
"""

import functools
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from pydantic import BaseModel

from zerolith.config.problems import join
from zerolith.config.schema import Config

MAX_GUESSED_CHARS = 64  # difflib is quadratic in the length of a key
ALIASES: Final = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}

_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,), "array": (list, tuple),
    "object": (Mapping,), "null": (type(None),),
}  # fmt: skip
_NOT_RULES = ("title", "default", "description")


class Fate(Enum):
    """What a known key leads to."""

    IMPLEMENTED = "implemented"
    HINT = "hint"  # accepted, type-checked, without effect
    LATER = "not supported yet"  # accepted only at a value that asks for nothing
    REMOVED = "removed upstream"  # the same


class Key(NamedTuple):
    """One known key."""

    path: str
    fate: Fate
    why: str  # the meaning of an implemented key, the reason of any other
    default: object
    rules: Mapping[str, Any] | type[BaseModel]  # JSON Schema of its value (any JSON), or the model that has the field
    is_switch: bool = False
    required: bool = False

    def admits(self, value: object) -> bool:
        """Whether a key that is not implemented may have this value; null asks for nothing."""
        if value is None:
            return True
        if self.is_switch:
            return not asks(value)
        if "enum" in self.schema:
            return any(_same(value, accepted) for accepted in self.schema["enum"])
        return not self.kinds or any(_is_kind(value, kind) for kind in self.kinds)

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON Schema of its value (any JSON)."""
        if isinstance(self.rules, Mapping):
            return self.rules
        return _field_schemas(self.rules)[self.path.rpartition(".")[2]]

    @property
    def kinds(self) -> list[str]:
        """The JSON types of its value; none means any."""
        kinds = self.schema.get("type", [])
        return [kinds] if isinstance(kinds, str) else kinds


@functools.cache
def _field_schemas(model: type[BaseModel]) -> dict[str, dict[str, Any]]:  # slow for all models, and seldom asked for
    fields = model.model_json_schema()["properties"]
    return {
        name: {rule: value for rule, value in field.items() if rule not in _NOT_RULES} for name, field in fields.items()
    }


def _same(value: object, accepted: object) -> bool:
    numbers = _is_kind(value, "number") and _is_kind(accepted, "number")
    return (numbers or type(value) is type(accepted)) and value == accepted


def _is_kind(value: object, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean") is isinstance(value, bool)


def asks(value: object) -> bool:
    """Whether the value of a Switch asks for something. `enabled` decides, the outermost first."""
    if not isinstance(value, Mapping):
        return value is not None and value is not False
    if "enabled" in value:
        return value["enabled"] is not False
    return any(not isinstance(inner, Mapping) or asks(inner) for inner in value.values())


def _models(model: type[BaseModel], section: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section of the schema and all below it, each with its path."""
    yield section, model
    for name, field in model.model_fields.items():
        for candidate in get_args(field.annotation) or (field.annotation,):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _models(candidate, join(section, name))


_MODELS: Final = dict(_models(Config, ""))


def _declared(path: str, fate: Fate, why: str, spec: Any) -> Key:  # any JSON
    if not isinstance(spec, dict):
        kind = next(kind for kind, types in _TYPES.items() if type(spec) in types)
        return Key(path, fate, why, spec, {"type": kind} if fate is Fate.HINT else {"enum": [spec]})
    if "one_of" in spec:
        return Key(path, fate, why, spec["one_of"][0], {"enum": spec["one_of"]})
    if "switch" in spec:
        return Key(path, fate, why, None, {"type": ["object", "boolean", "null"]}, is_switch=True)
    return Key(path, fate, why, None, {"type": [spec["type"], "null"]} if spec else {})


def _known_keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for section, model in _MODELS.items():
        for name, field in model.model_fields.items():
            path, required = join(section, name), field.is_required()
            if path not in _MODELS:
                default = None if required else field.get_default()
                keys[path] = Key(path, Fate.IMPLEMENTED, field.description or "", default, model, required=required)
    for group in json.loads(Path(__file__).with_name("deepspeed.json").read_text(encoding="utf-8")):
        for name, spec in group["keys"].items():
            path = join(group["section"], name)
            keys[path] = _declared(path, Fate[group["fate"].upper()], group["why"], spec)
    return keys


def _known_sections(paths: Mapping[str, Key]) -> dict[str, tuple[str, ...]]:
    """Each section's path ("" is the top) with the names of its keys and sections."""
    sections: dict[str, dict[str, None]] = {}
    for path in paths:
        section = ""
        for name in path.split("."):
            sections.setdefault(section, {})[name] = None
            section = join(section, name)
    return {section: tuple(names) for section, names in sections.items()}


KEYS: Final[Mapping[str, Key]] = _known_keys()
SECTIONS: Final[Mapping[str, tuple[str, ...]]] = _known_sections(KEYS)
# Those that the schema reads, with their meaning.
TYPED_SECTIONS: Final[Mapping[str, str]] = {path: str(model.__doc__) for path, model in _MODELS.items() if path}
NAMED_SECTIONS: Final = frozenset(path.rpartition(".")[0] for path, key in KEYS.items() if key.required)


def _homes(name: str) -> list[str]:
    return [path for path in (*KEYS, *SECTIONS) if path and path.rpartition(".")[2] == name]


def suggest(section: str, name: str) -> str:
    """What to write in place of an unknown key: its right section, or the nearest name."""
    remedy = "remove it"
    if len(name) > MAX_GUESSED_CHARS:
        return remedy
    homes = _homes(name)
    if len(homes) == 1:
        return f"it belongs at {homes[0]!r}"
    aliases = [alias.rpartition(".")[2] for alias in ALIASES if alias.rpartition(".")[0] == section]
    near = get_close_matches(name, (*SECTIONS[section], *aliases), n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]!r}?"
    if section in NAMED_SECTIONS:
        return f"if it is an argument, it belongs at {join(section, f'params.{name}')!r}"
    anywhere = get_close_matches(name, sorted({path.rpartition(".")[2] for path in KEYS}), n=1, cutoff=0.75)
    return f"did you mean {_homes(anywhere[0])[0]!r}?" if anywhere else remedy
