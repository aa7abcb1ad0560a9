"""Stages are triples of placements; nothing else knows their numbers."""

from __future__ import annotations

import pytest

from zerolith.errors import ConfigError
from zerolith.partitioning import PARTIAL, REPLICATE, SHARD, Partitioning, Placement

R, P, S = REPLICATE, PARTIAL, SHARD


@pytest.mark.parametrize(
    ("stage", "triple", "reproducible"),
    [
        (0, (R, P, R), (R, S, R)),
        (1, (R, P, S), (R, S, S)),
        (2, (R, S, S), (R, S, S)),
        (3, (S, S, S), (S, S, S)),
    ],
)
def test_each_stage_shards_one_thing_more(stage: int, triple: tuple, reproducible: tuple) -> None:
    assert Partitioning.from_stage(stage) == Partitioning(*triple)
    assert Partitioning.from_stage(stage, reproducible=True) == Partitioning(*reproducible)


def test_gradients_rest_unreduced_at_stages_0_and_1_only() -> None:
    assert [Partitioning.from_stage(stage).rests_partial for stage in range(4)] == [True, True, False, False]
    assert not any(Partitioning.from_stage(stage, reproducible=True).rests_partial for stage in range(4))


@pytest.mark.parametrize("triple", [(P, P, R), (P, S, S), (R, R, R), (R, R, S), (R, S, P), (S, S, R), (S, P, R)])
def test_placements_that_no_rank_could_step_are_refused(triple: tuple[Placement, ...]) -> None:
    with pytest.raises(ConfigError, match="not a legal partitioning"):
        Partitioning(*triple)


@pytest.mark.parametrize("stage", [-1, 4, 1.5, "3", None])
def test_a_stage_that_does_not_exist_is_refused_by_name(stage: object) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        Partitioning.from_stage(stage)
