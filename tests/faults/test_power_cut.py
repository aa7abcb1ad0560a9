"""Power cuts in saves: from whatever the disk has kept, the old checkpoint loads or the new one, whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

from faults.cuts import State, least_after, seen_after, states_after
from faults.disks import FaultyDisk, Op
from faults.scenarios import SCENARIOS, WORLD, Save, Scenario, run_save, save_alone, start_again
from faults.states import NOTHING, checkpoint_digest, left_overs, loads_as

STAGE = 3
RUN = "run"  # the folder of checkpoints, which the first save makes
FEWEST_CUT, FEWEST_KILLED = 500, 130  # states of a scenario that there were when this was written


class Story(NamedTuple):
    """What saves have done, one after the other, to a folder that was empty and safe on disk."""

    ops: list[Op]
    ends: list[int]  # how many operations were done when each save returned
    names: dict[str, str]  # digest of a checkpoint -> the number of its save, from 1

    def first(self, scenario: Scenario) -> int:
        """How many operations were done before the last save."""
        return self.ends[-2] if scenario.before else 0

    def allowed(self, num_done: int) -> tuple[str, ...]:
        """What may load after so many operations: what the last save that returned has saved, or the one under way."""
        num_returned = sum(end <= num_done for end in self.ends)
        return tuple(str(number) if number else NOTHING for number in (num_returned, num_returned + 1))


def tell_story(saves: Iterable[Save], root: Path) -> Story:
    root.mkdir()
    disk, ends, names = FaultyDisk(is_volatile=True), [], {}
    for number, save in enumerate(saves, start=1):
        run_save(STAGE, root / RUN, save, [disk] * WORLD)
        ends.append(len(disk.trace))
        names[checkpoint_digest(root / RUN / save.tag)] = str(number)
    return Story([inside(op, root) for op in in_turns(disk.trace)], ends, names)


def in_turns(ops: list[Op]) -> list[Op]:
    """The same operations, but where ranks write side by side, they take turns, one operation each."""
    ordered: list[Op] = []
    for is_data, group in groupby(ops, key=lambda op: op.path.name.startswith("rank-") and op.kind != "unlink"):
        files: dict[Path, list[Op]] = {}
        for op in group:
            files.setdefault(op.path if is_data else Path(), []).append(op)
        ordered += [op for turn in zip_longest(*files.values()) for op in turn if op is not None]
    return ordered


def inside(op: Op, root: Path) -> Op:
    """The operation with paths from `root` on."""
    target = Path(os.path.relpath(op.target, root)) if op.target is not None else None
    return op._replace(path=Path(os.path.relpath(op.path, root)), target=target)


class Shelf:
    """A folder that is put into one state after the other, and in it that of the checkpoints."""

    def __init__(self, root: Path, names: dict[str, str]) -> None:
        root.mkdir()
        self.root, self.folder = root, root / RUN
        self.names = names
        self._now: dict[Path, bytes | None] = {}
        self._digests: dict[State, str] = {}  # of folders of tags: the same files load as the same checkpoint

    def put(self, state: State) -> None:
        """Make the folder hold this and nothing else."""
        wanted = dict(state)
        for path in sorted(self._now.keys() - wanted.keys(), reverse=True):
            remove = Path.rmdir if self._now[path] is None else Path.unlink
            remove(self.root / path)
        for path, data in state:
            if data is None and path not in self._now:
                (self.root / path).mkdir()
            elif data is not None and self._now.get(path) != data:
                (self.root / path).write_bytes(data)
        self._now = wanted

    def look(self) -> None:
        """Learn what others have done to the folder."""
        (self.folder / ".zerolith.lock").unlink(missing_ok=True)
        paths = [(path, path.relative_to(self.root)) for path in self.root.rglob("*")]
        self._now = {name: path.read_bytes() if path.is_file() else None for path, name in paths}

    def loaded(self) -> str:
        """What loading the newest checkpoint gives. Raises CheckpointError if it does not load."""
        return loads_as(self.folder, self.names, self._digest)

    def start_again(self) -> list[Op]:
        """What the next job does there; returns its operations."""
        trace = start_again(STAGE, self.folder).trace
        self.look()
        return [inside(op, self.root) for op in trace]

    def save(self, save: Save, name: str) -> list[Op]:
        """A save by one rank; returns its operations."""
        disk = FaultyDisk(is_volatile=True)
        self.names = {**self.names, save_alone(STAGE, self.folder, save, disk): name}
        self.look()
        return [inside(op, self.root) for op in disk.trace]

    def _digest(self, home: Path) -> str:
        inner = home.relative_to(self.root)
        key = tuple(item for item in sorted(self._now.items()) if item[0].parent == inner)
        if key not in self._digests:
            self._digests[key] = checkpoint_digest(home)
        return self._digests[key]


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_a_power_cut_in_a_save_the_old_checkpoint_loads_or_the_new_one(name: str, quick_path: Path) -> None:
    scenario = SCENARIOS[name]
    story = tell_story([*scenario.before, scenario.last], quick_path / "story")
    shelf = Shelf(quick_path / "shelf", story.names)
    seen = set()
    for num_done in range(story.first(scenario), len(story.ops) + 1):
        allowed = story.allowed(num_done)
        for state in {*states_after((), story.ops[:num_done])}:
            if (state, *allowed) in seen:
                continue
            seen.add((state, *allowed))
            shelf.put(state)
            loaded = shelf.loaded()
            assert loaded in allowed, f"after {num_done} operations: {[str(path) for path, _ in state]}"
            shelf.start_again()
            assert left_overs(shelf.folder) == []
            assert shelf.loaded() == loaded
    print(f"{len(seen)} states")
    assert len(seen) >= FEWEST_CUT, "fewer states are looked at than before"


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_a_kill_and_then_a_power_cut_the_old_checkpoint_loads_or_the_new_one(name: str, quick_path: Path) -> None:
    """What the processes that died had seen, the next job takes for granted; the disk may not have it yet."""
    scenario = SCENARIOS[name]
    story = tell_story([*scenario.before, scenario.last], quick_path / "story")
    shelf = Shelf(quick_path / "shelf", story.names)
    seen = set()
    for killed in range(story.first(scenario), len(story.ops) + 1):
        if killed and story.ops[killed - 1].kind in ("write", "sync"):
            continue  # no names have changed
        shelf.put(seen_after((), story.ops[:killed]))
        swept = [*story.ops[:killed], *shelf.start_again()]
        saved = [*swept, *shelf.save(Save(scenario.last.tag, 4), "next")]
        for num_done in range(killed, len(saved) + 1):
            if num_done < len(saved) and saved[num_done - 1].kind in ("create", "write", "sync"):
                continue  # adds nothing that a later sync would not keep apart
            allowed = (*story.allowed(killed), "next") if num_done > len(swept) else story.allowed(killed)
            allowed = ("next",) if num_done == len(saved) else allowed
            for state in {*least_after((), saved[:num_done])}:
                if (state, *allowed) in seen:
                    continue
                seen.add((state, *allowed))
                shelf.put(state)
                loaded = shelf.loaded()
                assert loaded in allowed, f"killed after {killed}, cut after {num_done}: {[str(p) for p, _ in state]}"
    print(f"{len(seen)} states")
    assert len(seen) >= FEWEST_KILLED, "fewer states are looked at than before"
