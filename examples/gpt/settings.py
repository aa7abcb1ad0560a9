"""What a run is told: arguments and the JSON config, checked and merged. No torch, no processes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpt.shape import GPTShape

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "zero3_bf16.json"
PRECISIONS = ("fp32", "bf16", "fp16")
DEFAULT_SHAPE = GPTShape()
DEFAULT_STEPS = 500
NUM_EVALUATIONS = 5  # while training, unless --eval-interval says otherwise

JSONObject = dict[str, Any]  # Any: whatever JSON holds


class ArgumentsError(Exception):
    """The arguments or the config file say something that cannot be run. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run, decided."""

    config: JSONObject  # what `zerolith.initialize` gets, overrides applied
    stage: int
    precision: str
    shape: GPTShape
    steps: int
    seed: int
    ranks: int
    max_minutes: float
    eval_interval: int  # steps
    compile: bool
    folder: Path  # where the run writes
    start_ranks: bool  # this process has yet to start `ranks` ranks and is none of them

    def as_json(self) -> JSONObject:
        """What a reader of `result.json` needs to repeat the run."""
        return {
            "stage": self.stage, "precision": self.precision, "ranks": self.ranks, "steps": self.steps,
            "seed": self.seed, "layers": self.shape.layers, "width": self.shape.width,
            "seq_len": self.shape.seq_len, "compile": self.compile, "engine": self.config,
        }  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Raises in place of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentsError(message)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
    return int(text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        description="Pretrain a small GPT on the Python standard library's source with ZeRO.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, default=DEFAULT_CONFIG, metavar="JSON", help="default: zero3_bf16.json")
    add("--stage", type=int, choices=range(4), help="ZeRO stage, in place of the config's")
    add("--precision", choices=PRECISIONS, help="in place of the config's")
    add("--ranks", type=_count, help="processes to train with; starts them unless torchrun has")
    add("--steps", type=_count, default=DEFAULT_STEPS, help="optimizer steps (default: %(default)s)")
    add("--max-minutes", type=_minutes, default=5.0, help="stop earlier than this (default: %(default)s)")
    add("--eval-interval", type=_count, help="steps between evaluations (default: a fifth of --steps)")
    add("--seq-len", type=_count, default=DEFAULT_SHAPE.seq_len, help="in bytes (default: %(default)s)")
    add("--layers", type=_count, default=DEFAULT_SHAPE.layers, help="default: %(default)s")
    add("--width", type=_count, default=DEFAULT_SHAPE.width, help="default: %(default)s")
    add("--seed", type=_seed, default=0, help="of the weights, the batches and the samples")
    add("--name", help="folder of the run inside --out (default: from stage, precision and ranks)")
    add("--out", type=Path, default=Path("runs"), help="default: %(default)s")
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    return parser


def read_settings(arguments: Sequence[str], *, environment: Mapping[str, str]) -> Settings:
    """Settings from the command line; torchrun's WORLD_SIZE, where set, is the number of ranks.

    Raises ArgumentsError.
    """
    given = make_parser().parse_args(arguments)
    config = override(read_config(given.config), stage=given.stage, precision=given.precision)
    launched = environment.get("WORLD_SIZE")
    ranks = given.ranks or int(launched or 1)
    if launched is not None and ranks != int(launched):
        raise ArgumentsError(f"--ranks {ranks} disagrees with the {launched} ranks that torchrun started")
    shape = GPTShape(layers=given.layers, width=given.width, seq_len=given.seq_len)
    if shape.width % shape.head_dim:
        raise ArgumentsError(f"--width {shape.width} is not a multiple of {shape.head_dim}, a head's width")
    stage, precision = stage_of(config), precision_of(config)
    name = given.name or f"zero{stage}_{precision}_{ranks}ranks"
    if Path(name).name != name:
        raise ArgumentsError(f"--name {name!r} is not the name of one folder; --out says where it lies")
    return Settings(
        config=config,
        stage=stage,
        precision=precision,
        shape=shape,
        steps=given.steps,
        seed=given.seed,
        ranks=ranks,
        max_minutes=given.max_minutes,
        eval_interval=given.eval_interval or max(1, given.steps // NUM_EVALUATIONS),
        compile=given.compile,
        folder=given.out / name,
        start_ranks=launched is None and ranks > 1,
    )


def read_config(path: Path) -> JSONObject:
    """The config file's object. Raises ArgumentsError if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentsError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ArgumentsError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArgumentsError(f"--config {path} holds no JSON object")
    return config


def override(config: JSONObject, *, stage: int | None, precision: str | None) -> JSONObject:
    """A config with this stage and precision; None keeps the config's own. `config` stays as it is."""
    result = dict(config)
    if stage is not None:
        result["zero_optimization"] = {**_section(config, "zero_optimization"), "stage": stage}
    if precision is not None:
        for name in ("bf16", "fp16"):
            result.pop(name, None)
        if precision != "fp32":
            result[precision] = {**_section(config, precision), "enabled": True}
    return result


def stage_of(config: JSONObject) -> int:
    """The ZeRO stage that a config asks for."""
    stage: int = _section(config, "zero_optimization").get("stage", 0)
    return stage


def precision_of(config: JSONObject) -> str:
    """The compute precision that a config asks for: one of PRECISIONS."""
    enabled = [name for name in ("bf16", "fp16") if _section(config, name).get("enabled", False)]
    return enabled[0] if enabled else "fp32"


def _section(config: JSONObject, name: str) -> JSONObject:
    """A section, empty if absent; one that is no object is left for the engine to complain about."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}
