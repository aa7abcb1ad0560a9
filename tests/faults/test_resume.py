"""Resuming on another number of ranks or at another stage: the same parameters and optimizer states, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from faults.jobs import run_job
from faults.states import engine_digest, make_engine, run_on
from plain import STAGES

WORLDS = (1, 2, 3, 4)
SAVED, LAST = 2, 3  # steps
# Stages that add up several micro-batches in the same order, and so give the same bits.
FELLOWS = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}

Run = tuple[int, int]  # stage and ranks of a run that saved
Digests = dict[Run, tuple[str, str]]  # then, and at its end


def engine_for(stage: int, *, reproducible: bool) -> Any:
    # Units and buckets differ from stage to stage: they decide nothing.
    zero = {"reduce_bucket_size": 20 if stage % 2 else 10**9}
    return make_engine(stage, reproducible=reproducible, zero_optimization=zero)


def save_stages(folder: Path, world: int, reproducible: bool) -> Digests:
    """In a rank: one run of every stage, saved on its way."""
    digests = {}
    for stage in STAGES:
        engine = engine_for(stage, reproducible=reproducible)
        run_on(engine, to=SAVED)
        engine.save_checkpoint(folder / f"{stage}-{world}")
        saved = engine_digest(engine)
        run_on(engine, to=LAST)
        digests[stage, world] = saved, engine_digest(engine)
        engine.destroy()
    return digests


def load(folder: Path, runs: Sequence[Run], continued: Sequence[Run], stage: int, reproducible: bool) -> Digests:
    """In a rank: resume these runs at another stage, and go on with some of them."""
    engine, digests = engine_for(stage, reproducible=reproducible), {}
    for run in runs:
        engine.load_checkpoint(folder / "{}-{}".format(*run))
        assert engine.global_steps == SAVED
        loaded = engine_digest(engine)
        run_on(engine, to=LAST if run in continued else SAVED)
        digests[run] = loaded, engine_digest(engine)
    return digests


def save_table(folder: Path, *, reproducible: bool) -> Digests:
    """Runs of all stages on all numbers of ranks."""
    digests: Digests = {}
    for world in WORLDS:
        for ended in run_job(world, save_stages, folder, world, reproducible):
            assert ended.status == 0, ended
            digests |= ended.result
    return digests


@pytest.fixture(scope="module")
def fast(shared_path: Path) -> Digests:
    return save_table(shared_path / "fast", reproducible=False)


@pytest.fixture(scope="module")
def reproducible(shared_path: Path) -> Digests:
    return save_table(shared_path / "reproducible", reproducible=True)


def test_in_reproducible_mode_all_runs_are_one(fast: Digests, reproducible: Digests) -> None:
    assert len(set(reproducible.values())) == 1
    assert len(set(fast.values())) > 1, "nothing can be learnt from equality"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_run_resumes_on_any_number_of_ranks_at_any_stage(
    stage: int, world: int, fast: Digests, shared_path: Path
) -> None:
    fellows = [(fellow, world) for fellow in FELLOWS[stage]]
    for ended in run_job(world, load, shared_path / "fast", [*fast], fellows, stage, False):
        assert ended.status == 0, ended
        assert ended.result.keys() == fast.keys()
        for run, (loaded, last) in ended.result.items():
            assert loaded == fast[run][0], f"what was loaded of {run} is not what was saved"
            assert last == (fast[run][1] if run in fellows else loaded), f"{run} went on otherwise"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_in_reproducible_mode_every_run_goes_on_to_the_same_bits(
    stage: int, world: int, reproducible: Digests, shared_path: Path
) -> None:
    runs = [*reproducible]
    for ended in run_job(world, load, shared_path / "reproducible", runs, runs, stage, True):
        assert ended.status == 0, ended
        assert ended.result == reproducible
