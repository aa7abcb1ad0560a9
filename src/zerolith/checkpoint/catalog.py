"""Which checkpoints lie in a folder, in which state, and which of them is meant. Reads manifests and heads of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from zerolith.checkpoint.folder import (
    DEFAULT_TAG,
    LATEST,
    committed,
    find,
    folder_names,
    is_own,
    read_latest,
    tag_folder,
)
from zerolith.checkpoint.manifest import MANIFEST
from zerolith.checkpoint.reader import Progress, Reader
from zerolith.errors import CheckpointDamagedError, CheckpointError


class State(Enum):
    """What can be said of a checkpoint without reading all of it."""

    WHOLE = "whole"  # every file is there, as long as it should be, and begins as it should
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"  # of a later version, or not ours to read
    UNFINISHED = "unfinished"  # of a save that is under way, or that died


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tag of a folder. What only a manifest tells is empty where there is none that can be read."""

    tag: str
    state: State
    nbytes: int  # of its files
    step: int | None  # without a manifest: as the tag says, if it does
    why: str = ""  # it is not whole
    created: str = ""  # ISO 8601
    num_ranks: int = 0


def catalog(folder: Path) -> list[Entry]:
    """Every checkpoint and every unfinished one, by step. Raises CheckpointError for a folder that cannot be read."""
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        return sorted(_entries(folder), key=lambda each: (each.step or 0, each.created, each.tag))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: it cannot be read ({error.strerror})") from error


def latest_problem(folder: Path) -> str:
    """What is wrong with the marker of the newest checkpoint; "" if it leads to one, or is not there."""
    try:
        latest = read_latest(folder)
    except CheckpointDamagedError as error:
        return str(error)
    if latest is None or is_checkpoint(folder / latest):
        return ""
    return f"{folder / LATEST} names {latest!r}, which is no checkpoint"


def choose(folder: Path, tag: str | None) -> Path:
    """Where the checkpoint that is meant lies: `folder` is that of a job, or the checkpoint's own.

    Without a tag it is the one that `latest` names, or else the newest. Raises CheckpointError if there is none.
    """
    if tag is None and is_checkpoint(folder):
        return folder
    found = find(folder, tag)
    if found and (tag is None or (tag_folder(folder, tag) / MANIFEST).exists()):
        return tag_folder(folder, found[0])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    others = ", ".join(name for name, _ in committed(folder))
    what = f"there is no checkpoint {tag!r} here" if tag is not None else "there is no checkpoint here"
    raise CheckpointError(f"{folder}: {what}; there is {others}" if others else f"{folder}: {what}")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint's own, and not that of a job."""
    return (folder / MANIFEST).exists()


def open_checkpoint(folder: Path | str, tag: str | None, *, progress: Progress = lambda count: None) -> Reader:
    """A reader of the checkpoint that is meant. Raises CheckpointError."""
    return Reader(choose(Path(folder), tag), progress=progress)


def _entries(folder: Path) -> Iterator[Entry]:
    for tag in folder_names(folder):
        sizes = _sizes(folder / tag)
        if sizes:
            yield _entry(folder, tag, sum(sizes.values()), is_finished=MANIFEST in sizes)


def _sizes(home: Path) -> dict[str, int]:
    """Bytes of each file that is ours, by name."""
    sizes = {}
    with suppress(FileNotFoundError), os.scandir(home) as found:  # a job may be removing it
        for each in found:
            if is_own(each.name):
                sizes[each.name] = each.stat(follow_symlinks=False).st_size
    return sizes


def _entry(folder: Path, tag: str, nbytes: int, *, is_finished: bool) -> Entry:
    number = int(tag.removeprefix("global_step")) if DEFAULT_TAG.fullmatch(tag) else None
    if not is_finished:
        return Entry(tag=tag, state=State.UNFINISHED, nbytes=nbytes, why="it has no manifest", step=number)
    try:
        with Reader(tag_folder(folder, tag)) as reader:
            manifest = reader.manifest
    except CheckpointError as error:
        state = State.DAMAGED if isinstance(error, CheckpointDamagedError) else State.UNREADABLE
        return Entry(tag=tag, state=state, nbytes=nbytes, why=_inside(str(error), folder / tag), step=number)
    return Entry(
        tag=tag,
        state=State.WHOLE,
        nbytes=nbytes,
        step=manifest.step,
        created=manifest.created,
        num_ranks=manifest.num_ranks,
    )


def _inside(message: str, home: Path) -> str:
    """A message on a file without the folder in which it is."""
    return message.removeprefix(f"{home}{os.sep}").removeprefix(f"{home}: ")
