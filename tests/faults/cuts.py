"""Power cuts: every state in which POSIX lets a disk be after some operations, of which not all were synced.

What holds: data is safe after a sync of its file, a name after a sync of its folder. Operations on the same name keep
their order; a rename is done or not. All else may be lost or kept: a file may be cut off anywhere behind what was
synced, or have pages of zeros there; names that came, went or changed since the last sync of their folder may each be
as before or as after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from faults.disks import Op

PAGE = 4096
SECTOR = 512
MOST_PENDING = 14  # more operations that wait for a sync have too many subsets

State = tuple[tuple[Path, bytes | None], ...]  # sorted by path, which is relative; None is a folder
Names = dict[Path, bytes | int | None]  # contents that were safe from the start, the number of a creation, a folder


@dataclass
class Written:
    """A file that was created."""

    data: bytes = b""
    num_safe: int = 0  # bytes that were synced
    ends: tuple[int, ...] = (0,)  # of its writes

    def versions(self) -> list[bytes]:
        """What a cut may leave of it: first all, last no more than it must."""
        whole, safe = self.data, self.num_safe
        halves = {(a + b) // 2 for a, b in zip(self.ends, self.ends[1:], strict=False)}
        is_small = len(whole) <= 2 * PAGE
        ends = {*self.ends, *halves, *(range(0, len(whole), SECTOR) if is_small else ())}
        lengths = sorted((length for length in ends if safe <= length < len(whole)), reverse=True)
        starts = [safe, *range(safe - safe % PAGE + PAGE, len(whole), PAGE)] if safe < len(whole) else []
        zeros = [_zeroed(whole, start, min(start - start % PAGE + PAGE, len(whole))) for start in starts]
        everywhere = [_zeroed(whole, safe, len(whole))] if len(starts) > 1 else []
        return [whole, *zeros, *everywhere, *(whole[:length] for length in lengths)]


def states_after(base: State, ops: list[Op]) -> Iterator[State]:
    """All states after a cut that follows `ops`, before which `base` was safe on disk. Some come more than once."""
    files = _written(ops)
    for names in _names_left(base, ops):
        versions = {path: files[entry].versions() for path, entry in names.items() if isinstance(entry, int)}
        most = _with_data(names, {path: each[0] for path, each in versions.items()})
        least = _with_data(names, {path: each[-1] for path, each in versions.items()})
        yield _state(most)
        yield _state(least)
        for path, each in versions.items():
            for version in each[1:]:
                yield _state({**most, path: version})
                yield _state({**least, path: version})


def least_after(base: State, ops: list[Op]) -> Iterator[State]:
    """Those states in which no more is left of any file than must be."""
    files = _written(ops)
    for names in _names_left(base, ops):
        least = {path: files[entry].versions()[-1] for path, entry in names.items() if isinstance(entry, int)}
        yield _state(_with_data(names, least))


def seen_after(base: State, ops: list[Op]) -> State:
    """What processes see after `ops`, whether it is safe or not."""
    files, names = _written(ops), _names(base, ops, frozenset())
    return _state(_with_data(names, {p: files[entry].data for p, entry in names.items() if isinstance(entry, int)}))


def _names_left(base: State, ops: list[Op]) -> Iterator[Names]:
    for lost in _losses(ops, _pending(ops)):
        yield _names(base, ops, lost)


def _zeroed(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(stop - start) + data[stop:]


def _with_data(names: Names, data: Mapping[Path, bytes]) -> dict[Path, bytes | None]:
    return {path: data[path] if isinstance(entry, int) else entry for path, entry in names.items()}


def _state(entries: Mapping[Path, bytes | None]) -> State:
    return tuple(sorted(entries.items()))


def _written(ops: list[Op]) -> dict[int, Written]:
    """Files by the number of their creation."""
    files: dict[int, Written] = {}
    current: dict[Path, int] = {}
    for number, op in enumerate(ops):
        if op.kind == "create":
            files[number], current[op.path] = Written(), number
        elif op.kind == "write":
            file = files[current[op.path]]
            file.data += op.data
            file.ends += (len(file.data),)
        elif op.kind == "sync":
            file = files[current[op.path]]
            file.num_safe = len(file.data)
    return files


def _changed(op: Op) -> set[Path]:
    """Names that the operation changes."""
    if op.kind == "rename":
        assert op.target is not None, "a rename has a target"
        assert op.target.parent == op.path.parent, "files stay in their folder"
        return {op.path, op.target}
    return {op.path} if op.kind in ("create", "make_dir", "unlink", "remove_dir") else set()


def _pending(ops: list[Op]) -> list[int]:
    """Operations on names that a cut may undo: no sync of their folder has followed, nor has it gone for good."""
    pending: list[int] = []
    for number, op in enumerate(ops):
        if op.kind == "sync_dir":
            removed = {ops[each].path for each in pending if ops[each].kind == "remove_dir"}
            safe = {op.path, *(path for path in removed if path.parent == op.path)}
            pending = [each for each in pending if ops[each].path.parent not in safe]
        elif _changed(op):
            pending.append(number)
    assert len(pending) <= MOST_PENDING, f"{len(pending)} operations wait for a sync"
    return pending


def _losses(
    ops: list[Op], pending: list[int], lost: frozenset[int] = frozenset(), stuck: frozenset[Path] = frozenset()
) -> Iterator[frozenset[int]]:
    """Sets of pending operations that a cut may undo: with one, also all later ones on the same names."""
    if not pending:
        yield lost
        return
    first, rest = pending[0], pending[1:]
    names = _changed(ops[first])
    if not names & stuck:
        yield from _losses(ops, rest, lost, stuck)
    yield from _losses(ops, rest, lost | {first}, stuck | names)


def _names(base: State, ops: list[Op], lost: frozenset[int]) -> Names:
    names: Names = dict(base)
    for number, op in enumerate(ops):
        if number in lost:
            continue
        if op.kind == "create":
            names[op.path] = number
        elif op.kind == "make_dir":
            names[op.path] = None
        elif op.kind == "rename":
            assert op.target is not None, "a rename has a target"
            names[op.target] = names.pop(op.path)
        elif op.kind in ("unlink", "remove_dir"):
            del names[op.path]
    return {path: entry for path, entry in names.items() if all(each in names for each in path.parents if each.name)}
