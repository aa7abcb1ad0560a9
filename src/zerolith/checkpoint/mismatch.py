"""Whether a checkpoint fits a model and an optimizer, and if not, everything that differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zerolith.checkpoint.manifest import Manifest, ParameterRecord
from zerolith.errors import CheckpointError

SHOWN = 20  # names in a message
UNKNOWN = ""  # the class of an optimizer of which nothing but its states and options is known
STATES = {  # without which the classes of these names cannot go on
    "Adam": {"exp_avg", "exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq"},
    "NAdam": {"exp_avg", "exp_avg_sq"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "Lamb": {"exp_avg", "exp_avg_sq"},
    "Lion": {"exp_avg"},
    "SGD": {"momentum_buffer"},
    "Adagrad": {"sum"},
    "RMSprop": {"square_avg"},
}


def matching_names(manifest: Manifest, parameters: Mapping[str, ParameterRecord], *, strict: bool) -> set[str]:
    """Parameters that are in both and have values in the checkpoint, by the model's names.

    Raises CheckpointError for shapes that differ and, if `strict`, for names that are in one of them only.
    """
    missing = [name for name in parameters if name not in manifest.parameters]
    unexpected = [name for name in manifest.parameters if name not in parameters]
    shapes = [
        (name, manifest.parameters[name].shape, record.shape)
        for name, record in parameters.items()
        if name in manifest.parameters and manifest.parameters[name].shape != record.shape
    ]
    refuse_mismatch(shapes, missing, unexpected, strict=strict, hint="load_module_strict=False")
    # A frozen parameter that was left out when saving has a record and no value; the model keeps its own.
    return {name for name in parameters if name in manifest.parameters and f"value/{name}" in manifest.tensors}


def refuse_mismatch(
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    missing: list[str],
    unexpected: list[str],
    *,
    strict: bool,
    hint: str,
) -> None:
    """Raise CheckpointError for shapes (name, in the checkpoint, in the model) that differ and, if `strict`, for names.

    hint: the option that takes what fits.
    """
    differ = [f"{name} is {tuple(a)} in the checkpoint and {tuple(b)} in the model" for name, a, b in shapes]
    problems = [f"shapes that differ: {_listed(differ)}"] if differ else []
    if strict and missing:
        problems.append(f"missing in the checkpoint: {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"not in the model: {_listed(unexpected)}")
    if problems:
        advice = "" if differ else f"; {hint} loads what fits"
        raise CheckpointError(f"the checkpoint is not of this model: {'; '.join(problems)}{advice}")


def check_optimizer(saved: Mapping[str, Any] | None, kind: str, groups: Iterable[Iterable[str]]) -> None:
    """Raise CheckpointError if a checkpoint's optimizer (JSON) is not of this kind or groups parameters otherwise."""
    advice = "; load with load_optimizer_states=False to start with a fresh optimizer"
    if saved is None:
        raise CheckpointError(f"the checkpoint has no optimizer states{advice}")
    if saved["class"] not in (kind, UNKNOWN):
        raise CheckpointError(f"the checkpoint's optimizer is {saved['class']}, this run's is {kind}{advice}")
    theirs = [set(group["params"]) for group in saved["groups"]]
    ours = [set(group) for group in groups]
    if len(theirs) != len(ours):
        raise CheckpointError(f"the checkpoint has {len(theirs)} param groups, this run has {len(ours)}{advice}")
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if moved := sorted(our & set().union(*theirs) - their):
            raise CheckpointError(f"param group {number} holds other parameters than saved: {_listed(moved)}{advice}")


def check_states(manifest: Manifest, kind: str) -> None:
    """Raise CheckpointError if an optimizer of this kind cannot go on with the states of one that is not known."""
    found = {name.split("/")[1] for name in manifest.tensors if name.startswith("optimizer/")}
    needed = STATES.get(kind.rpartition(".")[2], set())
    if found and not needed <= found:
        raise CheckpointError(
            f"the checkpoint's optimizer has kept {_listed(sorted(found))}, and {kind} needs "
            f"{_listed(sorted(needed))}; load with load_optimizer_states=False to start with a fresh optimizer"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
