"""kill -9 of one rank, or of all, at each file operation of a save: the old checkpoint loads, or the new one, whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults.disks import DeadlyDisk, Moment, moments
from faults.scenarios import (
    SCENARIOS,
    Save,
    old_state,
    rehearse,
    run_beside_victim,
    run_to_death,
    save_alone,
    start_again,
)
from faults.states import left_overs, loads_as
from zerolith.errors import PeerLostError

SOON_S = 10.0  # in which the other ranks notice
VICTIMS = ("rank 0", "rank 1", "all at rank 0", "all at rank 1")
# Operations of each rank in each scenario that there were when this was written.
FEWEST = {("first", 0): 26, ("later", 0): 26, ("again", 0): 26, ("retention", 0): 36}
FEWEST |= {(name, 1): 9 for name in SCENARIOS}


@pytest.mark.parametrize(("stage", "victim"), [*((3, victim) for victim in VICTIMS), (1, "rank 0"), (1, "rank 1")])
@pytest.mark.parametrize("name", SCENARIOS)
def test_whenever_ranks_are_killed_in_a_save_a_whole_checkpoint_is_the_newest(
    name: str, stage: int, victim: str, quick_path: Path
) -> None:
    scenario, at, takes_all = SCENARIOS[name], int(victim[-1]), victim.startswith("all")
    rehearsal = rehearse(stage, quick_path, scenario)
    ops = rehearsal.ops[at]
    assert len(ops) >= FEWEST[name, at], "the matrix has shrunk"
    # Within a write the stage makes no difference: it decides what is written, not how.
    points = [moment for moment in moments(ops) if stage == 3 or not moment.is_halfway]
    loaded = []
    for number, moment in enumerate(points):
        folder = quick_path / str(number)
        shutil.copytree(quick_path / "old", folder)
        was_reported = moment == points[-1]
        if takes_all:
            run_to_death(stage, folder, scenario.last, at, DeadlyDisk(moment))
        else:
            survived = run_beside_victim(stage, folder, scenario.last, at, DeadlyDisk(moment))
            assert survived.error is None or isinstance(survived.error, PeerLostError), survived
            assert survived.seconds < SOON_S
            was_reported |= survived.error is None
        state = loads_as(folder, rehearsal.names)
        assert state in (old_state(scenario), "new"), moment
        assert state == "new" or not was_reported, f"{moment}: a reported save is lost"
        start_again(stage, folder)  # which needs nobody to clean up: the lock is free, and what was left goes
        assert left_overs(folder) == []
        assert loads_as(folder, rehearsal.names) == state
        if number % 8 == 0:
            digest = save_alone(stage, folder, Save("global_step4", 4))
            assert loads_as(folder, {**rehearsal.names, digest: "next"}) == "next"
        loaded.append(state)
    assert loaded[0] == old_state(scenario)
    assert loaded[-1] == "new"
    assert loaded == sorted(loaded, key=lambda state: state == "new"), "the new one came and went"
    print(f"{len(points)} moments")


def test_moments_are_before_each_operation_in_each_write_and_at_the_end(quick_path: Path) -> None:
    ops = rehearse(3, quick_path, SCENARIOS["first"]).ops[1]
    assert [op.kind for op in ops] == ["create", *["write"] * (len(ops) - 2), "sync"]
    assert len(moments(ops)) == 2 + 2 * (len(ops) - 2) + 1
    assert moments(ops)[-1] == Moment(len(ops))
