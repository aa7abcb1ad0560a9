"""What `zerolith checkpoint info` shows: the checkpoints of a folder, or what is in one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zerolith.checkpoint.catalog import Entry, State, catalog, latest_problem
from zerolith.checkpoint.folder import read_latest
from zerolith.checkpoint.manifest import DTYPES, Manifest, read_manifest
from zerolith.checkpoint.stored import left_out
from zerolith.cli.words import many, size_text

KINDS = {"value": "weights", "optimizer": "optimizer", "buffer": "buffers", "gradient": "gradients"}
RANDOM, OTHER, HEADERS = "random numbers", "other", "headers"
ORDER = (*KINDS.values(), RANDOM, OTHER, HEADERS)

LOOKED_AT = "Manifests, file sizes and headers were looked at; `zerolith checkpoint verify` reads every byte."


# --- a folder -----------------------------------------------------------------------------------------


def describe_folder(folder: Path) -> dict[str, Any]:
    """The checkpoints of `folder` as JSON. Raises CheckpointError."""
    entries = catalog(folder)
    problem = latest_problem(folder)
    return {
        "folder": str(folder),
        "latest": None if problem else read_latest(folder),
        "problem": problem,
        "checkpoints": [_as_json(each) for each in entries],
    }


def folder_text(described: dict[str, Any]) -> str:
    """`describe_folder` for people."""
    entries = described["checkpoints"]
    if not entries:
        return f"{described['folder']}: no checkpoints"
    total = size_text(sum(each["bytes"] for each in entries))
    rows = [("step", "tag", "saved", "ranks", "size", "state")]
    for each in entries:
        mark = ", latest" if each["tag"] == described["latest"] else ""
        rows.append(
            (
                "-" if each["step"] is None else str(each["step"]),
                each["tag"],
                _when(each["created"]),
                str(each["num_ranks"] or "-"),
                size_text(each["bytes"]),
                f"{each['state']}{mark}{': ' if each['why'] else ''}{each['why']}",
            )
        )
    lines = [f"{described['folder']}: {many(len(entries), 'checkpoint')}, {total}", "", *_table(rows, right=(0, 3, 4))]
    if described["problem"]:
        lines += ["", described["problem"]]
    if any(each["state"] == State.WHOLE.value for each in entries):
        lines += [
            "",
            "Manifests, file sizes and headers were looked at; `zerolith checkpoint verify` reads every byte.",
        ]
    return "\n".join(lines)


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "tag": entry.tag,
        "state": entry.state.value,
        "why": entry.why,
        "step": entry.step,
        "created": entry.created or None,
        "num_ranks": entry.num_ranks or None,
        "bytes": entry.nbytes,
    }


# --- one checkpoint -----------------------------------------------------------------------------------


def describe_checkpoint(home: Path) -> dict[str, Any]:
    """What the checkpoint in `home` holds, as JSON. Raises CheckpointError."""
    manifest = read_manifest(home)
    state: dict[str, Any] = dict(manifest.state)
    optimizer = state.get("optimizer")
    return {
        "folder": str(home),
        "id": manifest.id,
        "created": manifest.created,
        "step": manifest.step,
        "num_ranks": manifest.num_ranks,
        "libraries": manifest.libraries,
        "counters": state.get("counters") or {},
        "loss_scale": (state.get("scaler") or {}).get("scale"),
        "optimizer": optimizer and {"class": optimizer["class"], "groups": len(optimizer["groups"])},
        "has_schedule": state.get("scheduler") is not None,
        "has_data_position": state.get("loader") is not None,
        "client_state": sorted(state.get("client") or {}),
        "parameters": _parameters(manifest),
        "kinds": _kinds(manifest),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
    }


def checkpoint_text(described: dict[str, Any]) -> str:
    """`describe_checkpoint` for people."""
    rows = [("kind", "tensors", "bytes", "dtypes", "")]
    for name, kind in described["kinds"].items():
        count = str(kind["tensors"]) if kind["tensors"] else ""
        rows.append((name, count, size_text(kind["bytes"]), ", ".join(kind["dtypes"]), ", ".join(kind["states"])))
    rows.append(("total", "", size_text(described["bytes"]), f"in {many(described['files'], 'file')}", ""))
    facts = [f"  {name:<12}{fact}" for name, fact in _facts(described)]
    return "\n".join([described["folder"], "", *facts, "", *_table(rows, right=(1, 2))])


def _facts(described: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counters, params, optimizer = described["counters"], described["parameters"], described["optimizer"]
    yield (
        "saved",
        f"{_when(described['created'])}, at step {described['step']}, by {many(described['num_ranks'], 'rank')}",
    )
    yield "with", ", ".join(f"{name} {version}" for name, version in described["libraries"].items())
    what = f"{params['elements']:,} elements in {many(params['tensors'], 'parameter')}"
    yield "model", f"{what}, computed in {', '.join(params['dtypes']) or 'nothing'}"
    if params["left_out"]:
        yield "left out", f"{many(params['left_out'], 'frozen parameter')}, as the save was told"
    for names in params["tied"]:
        yield "tied", " = ".join(names)
    if optimizer:
        yield "optimizer", f"{optimizer['class'] or 'not known'}, {many(optimizer['groups'], 'param group')}"
    yield "samples", f"{counters.get('global_samples', 0):,}, {counters.get('train_batch_size', '?')} a step"
    if counters.get("skipped_steps"):
        yield "skipped", many(counters["skipped_steps"], "step")
    if described["loss_scale"] not in (None, 1.0):
        yield "loss scale", f"{described['loss_scale']:g}"
    others = [name for name in ("schedule", "data position") if described[f"has_{name.replace(' ', '_')}"]]
    others += [f"client state ({', '.join(described['client_state'])})"] if described["client_state"] else []
    if others:
        yield "as well", ", ".join(others)


def _parameters(manifest: Manifest) -> dict[str, Any]:
    records = manifest.parameters
    return {
        "tensors": len(records),
        "elements": sum(math.prod(record.shape) for record in records.values()),
        "trained_elements": sum(math.prod(record.shape) for record in records.values() if record.trained),
        "left_out": len(left_out(manifest)),
        "dtypes": sorted({record.dtype for record in records.values()}),
        "tied": [[name, *record.aliases] for name, record in records.items() if record.aliases],
    }


def _kinds(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Tensors, bytes, dtypes and names of optimizer states, by kind; the bytes of all are those of the files."""
    kinds: dict[str, dict[str, Any]] = {}
    left = sum(file.bytes for file in manifest.files)
    for name, tensor in manifest.tensors.items():
        kind, state = _kind(name)
        nbytes = tensor.numel * DTYPES[tensor.dtype].itemsize
        into = kinds.setdefault(kind, {"tensors": 0, "bytes": 0, "dtypes": set(), "states": set()})
        into["tensors"] += 1
        into["bytes"] += nbytes
        into["dtypes"].add(tensor.dtype)
        into["states"] |= {state} if state else set()
        left -= nbytes
    kinds[HEADERS] = {"tensors": 0, "bytes": left, "dtypes": set(), "states": set()}
    order = [kind for kind in ORDER if kind in kinds]
    return {kind: {name: _plain(value) for name, value in kinds[kind].items()} for kind in order}


def _kind(name: str) -> tuple[str, str]:
    """The kind of a tensor, and of an optimizer state its key."""
    words = name.split("/")
    if words[0] == "rank":
        words = words[2:]
    if words[:1] == ["rng"]:
        return RANDOM, ""
    return KINDS.get(words[0], OTHER), words[1] if words[0] == "optimizer" else ""


def _plain(value: Any) -> Any:  # of what is counted, JSON
    return sorted(value) if isinstance(value, set) else value


# --- words and tables ---------------------------------------------------------------------------------


def _when(created: str | None) -> str:
    return f"{created[:16].replace('T', ' ')} UTC" if created else "-"


def _table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> list[str]:
    """Rows as lines, columns aligned: the numbers of `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
