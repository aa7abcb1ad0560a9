"""Removing old checkpoints and left-overs by hand, while no job writes to the folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from zerolith.checkpoint.catalog import State, catalog
from zerolith.checkpoint.disk import Disk
from zerolith.checkpoint.folder import (
    Kept,
    Lock,
    folder_names,
    left_over,
    read_latest,
    remove,
    superseded,
    sweep,
)
from zerolith.errors import CheckpointError


class Going(NamedTuple):
    """What is removed."""

    tags: dict[str, int]  # bytes of each checkpoint, the oldest first
    left_overs: dict[Path, int]  # bytes of each file of unfinished saves
    spared: dict[str, str]  # tags that would be counted if they were whole, and what is wrong with them


def going(folder: Path, kept: Kept) -> Going:
    """What `clean_up` would remove. Raises CheckpointError.

    The newest whole checkpoint stays, and so do tags that a user chose, what `latest` names, and what is damaged:
    somebody may want to rescue it.
    """
    entries = catalog(folder)
    whole = {each.tag: each for each in entries if each.state is State.WHOLE}
    steps = {tag: each.step or 0 for tag, each in whole.items()}
    tags = superseded(steps, kept, stay={*list(steps)[-1:], read_latest(folder)})
    files = [path for name in folder_names(folder) for path in left_over(folder / name)]
    return Going(
        tags={tag: whole[tag].nbytes for tag in tags},
        left_overs={path: path.lstat().st_size for path in files},
        spared={each.tag: each.why for each in entries if each.state in (State.DAMAGED, State.UNREADABLE)},
    )


def clean_up(folder: Path, kept: Kept) -> Going:
    """Remove checkpoints that `kept` does not keep, and what saves that died have left; returns what has gone.

    Raises CheckpointLockedError if a job writes here, and CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    try:
        lock = Lock(folder)
        try:
            gone, disk = going(folder, kept), Disk()
            for tag in gone.tags:
                remove(disk, folder, tag)
            sweep(disk, folder)
        finally:
            lock.release()
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where}: {error.strerror or error} while removing old checkpoints") from error
    return gone
