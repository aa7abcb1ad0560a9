"""The folder of a job's checkpoints: tags, the lock, `latest`, left-overs, and which old checkpoints go.

    <folder>/latest                             the newest tag and its checksum
    <folder>/.zerolith.lock                     who writes here; locked while that process lives
    <folder>/<tag>/manifest.json                makes <tag> a checkpoint
    <folder>/<tag>/rank-00000-<id>.safetensors  data of the checkpoint with that id

[Note: commit] A checkpoint exists from the moment that its manifest, written under another name and synced, is renamed
to manifest.json. All it names was synced before. Data files carry the id of their save in their names, so saving a
tag again writes beside the old data and the rename replaces one whole checkpoint by another.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from zerolith.checkpoint.disk import Disk, read_file, write_file
from zerolith.checkpoint.manifest import MANIFEST, Manifest, checksum, read_manifest
from zerolith.errors import CheckpointDamagedError, CheckpointError, CheckpointLockedError

LATEST, LOCK, PROBE = "latest", ".zerolith.lock", ".zerolith.probe-"
OWN_FILE = re.compile(r"rank-[0-9]{5,}-[0-9a-f]{16}\.safetensors")
DEFAULT_TAG = re.compile(r"global_step[0-9]+")
MAX_TAG_BYTES = 200
SMALL = 4096  # bytes of `latest` and of the lock


class Kept(NamedTuple):
    """Which checkpoints stay when a new one is there. None: all."""

    last: int | None = None  # so many of the newest
    every: int | None = None  # and those of steps that this divides


def check_tag(tag: str) -> str:
    """`tag`, which must be a plain file name. Raises CheckpointError."""
    is_taken = tag in (LATEST, f"{LATEST}.new", MANIFEST)
    if not tag or tag.startswith(".") or is_taken or "/" in tag or "\\" in tag or "\0" in tag:
        raise CheckpointError(f"tag {tag!r}: a tag names a folder; use letters, digits, '_', '-' and '.', not first")
    if not tag.isprintable() or len(tag.encode()) > MAX_TAG_BYTES:  # what is printable has no lone surrogates
        raise CheckpointError(f"tag {tag[:40]!r}...: it is too long, or has control characters")
    return tag


def tag_folder(folder: Path, tag: str) -> Path:
    """Where `tag` lies. Raises CheckpointError if that is a link: it may lead out of the folder."""
    path = folder / check_tag(tag)
    if path.is_symlink():
        raise CheckpointError(f"{path}: it is a symbolic link, and those are not followed")
    return path


def committed(folder: Path) -> list[tuple[str, Manifest]]:
    """(tag, manifest) of every whole checkpoint, the oldest first; what is damaged is left out."""
    found = []
    for name in folder_names(folder):
        with suppress(CheckpointError):
            found.append((name, read_manifest(tag_folder(folder, name))))
    return sorted(found, key=lambda each: (each[1].step, each[1].created, each[0]))


def read_latest(folder: Path) -> str | None:
    """The tag that `latest` names; None if there is no such file. Raises CheckpointDamagedError."""
    path = folder / LATEST
    try:
        lines = read_file(path, limit=SMALL).decode().split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointDamagedError(f"{path}: it cannot be read ({error})") from error
    if len(lines) != 3 or lines[1] != checksum(lines[0].encode()) or lines[2]:
        raise CheckpointDamagedError(f"{path}: it is not what was written; name a tag when you load")
    return lines[0]


def write_latest(disk: Disk, folder: Path, tag: str, *, read_back: bool = False) -> None:
    """Make `latest` name `tag`. Raises OSError, and CheckpointDamagedError as `write_file`."""
    with suppress(FileNotFoundError):
        disk.unlink(folder / f"{LATEST}.new")  # of a save that died
    write_file(disk, folder / LATEST, f"{tag}\n{checksum(tag.encode())}\n".encode(), read_back=read_back)


def find(folder: Path, tag: str | None, *, all_whole: bool = False) -> list[str]:
    """The tag to load: the given one, that of `latest`, or else the newest whole checkpoint; nothing if there is none.

    With `all_whole` and no tag given, the other whole checkpoints follow, the newest first. Raises CheckpointError.
    """
    if tag is not None:
        return [check_tag(tag)]
    try:
        latest = read_latest(folder)
    except CheckpointDamagedError:
        if not all_whole:
            raise
        latest = None
    is_there = latest is not None and (tag_folder(folder, latest) / MANIFEST).exists()
    found = [latest] if latest is not None and is_there else []
    if found and not all_whole:
        return found
    whole = [name for name, _ in reversed(committed(folder)) if name not in found]
    if latest is not None and not found and not whole:
        raise CheckpointError(f"{folder / LATEST} names {latest!r}, which is not there, and there is no other")
    return [*found, *(whole if all_whole else whole[:1])]


class Lock:
    """The right to write to a folder, held by one process at a time and given back by the system when it dies.

    Engines of one process share it; `writing` keeps them from writing the same tag at once.
    """

    def __init__(self, folder: Path) -> None:
        """Take it. Raises CheckpointLockedError, saying who holds it, and OSError."""
        self.path = folder / LOCK
        self._file = -1
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(self.path)
            os.close(file)
            raise CheckpointLockedError(
                f"{folder}: another job writes checkpoints here ({holder}); stop it, or save to another folder"
            ) from error
        except OSError:
            os.close(file)
            raise
        self._file = file
        self._tags: set[str] = set()  # being written
        self._guard = threading.Lock()
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(facts).encode() + b"\n", 0)

    def __del__(self) -> None:
        self.release()

    @contextmanager
    def writing(self, tag: str) -> Iterator[None]:
        """Raises CheckpointLockedError if another engine of this process is writing `tag`."""
        with self._guard:
            if tag in self._tags:
                raise CheckpointLockedError(f"{self.path.parent / tag}: another engine of this process writes it now")
            self._tags.add(tag)
        try:
            yield
        finally:
            self._tags.discard(tag)

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


# Locks that this process holds, by folder: a second one in the same process would meet the first as a stranger's.
_HELD: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def _let_go_in_child() -> None:
    """A worker that outlives the process that has forked it must not keep the folder locked."""
    for lock in [*_HELD.values()]:
        lock.release()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def take_lock(folder: Path) -> tuple[Lock, bool]:
    """The lock of `folder`, and whether it is new to this process. Raises CheckpointLockedError and OSError."""
    where = folder.resolve()
    lock = _HELD.get(where)
    is_new = lock is None
    if lock is None:
        lock = _HELD[where] = Lock(folder)
    return lock, is_new


def _holder(path: Path) -> str:
    try:
        facts = json.loads(read_file(path, limit=SMALL))
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return "it has not said who it is"


def sweep(disk: Disk, folder: Path) -> list[Path]:
    """Remove what saves and removals that died have left; returns what has gone. Only the holder of the lock may."""
    gone = [path for path in folder.iterdir() if path.name == f"{LATEST}.new" or path.name.startswith(PROBE)]
    for path in gone:
        disk.unlink(path)
    for name in folder_names(folder):
        home = folder / name
        left = left_over(home)
        if left:
            disk.sync_dir(home)  # a manifest that came or went must have done so for good before its files go
        for path in left:
            disk.unlink(path)
        gone += left
        if (left or DEFAULT_TAG.fullmatch(name)) and not any(home.iterdir()):
            disk.remove_dir(home)
    return gone


def left_over(home: Path) -> list[Path]:
    """Data files in the folder of a tag that its manifest does not name, and a manifest that was never renamed.

    Nothing where there is a manifest that cannot be read: somebody may want to rescue what it names.
    """
    named: set[str] = set()
    if (home / MANIFEST).exists():
        try:
            named = {file.name for file in read_manifest(home).files}
        except CheckpointError:
            return []
    own = [path for path in home.iterdir() if is_own(path.name) and path.name != MANIFEST]
    return [path for path in sorted(own) if path.name not in named]


def is_own(name: str) -> bool:
    """Whether a file of this name in the folder of a tag is ours, of a checkpoint or of an unfinished one."""
    return bool(OWN_FILE.fullmatch(name)) or name in (MANIFEST, f"{MANIFEST}.new")


def remove(disk: Disk, folder: Path, tag: str) -> None:
    """Remove a checkpoint; first its manifest, so that what dies half-way leaves none rather than a damaged one."""
    home = tag_folder(folder, tag)
    names = [file.name for file in read_manifest(home).files]
    disk.unlink(home / MANIFEST)
    disk.sync_dir(home)
    for name in names:
        with suppress(FileNotFoundError):
            disk.unlink(home / name)
    if not any(home.iterdir()):  # a client's own files keep the folder
        disk.remove_dir(home)
    disk.sync_dir(folder)


def prune(disk: Disk, folder: Path, kept: Kept, *, newest: str) -> list[str]:
    """Remove the checkpoints that `kept` does not keep; returns their tags. `newest` has just been committed.

    Tags that a user chose stay, and so does what `latest` names.
    """
    if kept.last is None:
        return []
    steps = {tag: manifest.step for tag, manifest in committed(folder)}
    try:
        latest = read_latest(folder)
    except CheckpointDamagedError:  # who knows which one it named
        return []
    going = superseded(steps, kept, stay={newest, latest})
    for tag in going:
        remove(disk, folder, tag)
    return going


def superseded(steps: Mapping[str, int], kept: Kept, *, stay: Set[str | None]) -> list[str]:
    """The tags of `steps`, the oldest first, that `kept` does not keep; `stay` and those that a user chose stay."""
    if kept.last is None:
        return []
    ours = [tag for tag in steps if DEFAULT_TAG.fullmatch(tag)]
    every = {tag for tag in ours if kept.every and steps[tag] % kept.every == 0}
    return [tag for tag in ours if tag not in {*ours[-kept.last :], *every, *stay}]


def folder_names(folder: Path) -> Iterator[str]:
    """Names of the folders in `folder`, links left out."""
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return


def probe(disk: Disk, folder: Path) -> None:
    """See that checkpoints can be written to `folder`, which is made if need be. Raises CheckpointError."""
    path = folder / f"{PROBE}{secrets.token_hex(8)}"  # a name that no other process has, here or on another host
    try:
        make_folder(disk, folder)
        write_file(disk, path, b"probe\n")
        disk.unlink(path)
    except OSError as error:
        raise CheckpointError(f"{folder}: checkpoints cannot be written here ({error.strerror})") from error


def make_folder(disk: Disk, folder: Path) -> None:
    """Make a folder and its parents; returns when they would survive a power cut. Raises OSError."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with suppress(OSError):  # it is hardly ever needed, and need not be ours to read
        disk.sync_dir(folder.parent)  # a job may have died between making the folder and this
    for path in reversed(missing):
        with suppress(FileExistsError):
            disk.make_dir(path)
        try:
            disk.sync_dir(path.parent)
        except OSError:
            with suppress(OSError):
                disk.remove_dir(path)  # which only an empty folder lets happen
            raise
