"""What each rank keeps of parameters, gradients and optimizer states: three placements, and nothing else.

 placement       on the data-parallel axis     from -> to               collective
 REPLICATE  R    every rank has all of it      SHARD     -> REPLICATE   all-gather
 PARTIAL    P    every rank has its own term   PARTIAL   -> REPLICATE   reduce-scatter, then all-gather
 SHARD      S    every rank has its range      PARTIAL   -> SHARD       reduce-scatter
                                               REPLICATE -> SHARD       (local slice)

This is the only file that knows the ZeRO stages by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from zerolith.errors import ConfigError


class Placement(Enum):
    """How one buffer's content lies over the data-parallel ranks."""

    REPLICATE = "R"
    PARTIAL = "P"
    SHARD = "S"


REPLICATE, PARTIAL, SHARD = Placement.REPLICATE, Placement.PARTIAL, Placement.SHARD


@dataclass(frozen=True, slots=True)
class Partitioning:
    """Where parameters, gradients and optimizer states rest.

    Legal: parameters and optimizer states are REPLICATE or SHARD; sharded parameters need sharded states
    (an optimizer must not write what no rank keeps); gradients are PARTIAL or SHARD.
    """

    params: Placement
    grads: Placement
    optim: Placement

    def __post_init__(self) -> None:
        legal = (
            self.params is not PARTIAL
            and self.optim is not PARTIAL
            and self.grads is not REPLICATE
            and not (self.params is SHARD and self.optim is REPLICATE)
        )
        if not legal:
            raise ConfigError(f"{self} is not a legal partitioning: {type(self).__doc__}")

    @classmethod
    def from_stage(cls, stage: int, *, reproducible: bool = False, rests_sharded: bool = False) -> Partitioning:
        """The triple of a ZeRO stage.

        With `rests_sharded`, parameters rest as shards at stages 1 and 2, too: whole from their first use after a step
        to the next one, they are sent as often as at the step, but each when the forward comes to it.

        With `reproducible`, gradients are reduced at every micro-batch at every stage, so that the terms are
        added in one global order (micro-batch g of rank r is number g * ranks + r).
        """
        try:
            params, grads, optim = STAGES[stage]
        except KeyError:
            raise ConfigError(f"zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3") from None
        return cls(SHARD if rests_sharded else params, SHARD if reproducible else grads, optim)

    @property
    def shards_states_only(self) -> bool:
        """Whether optimizer states are sharded under whole parameters: without an optimizer, for nothing."""
        return self.params is REPLICATE and self.optim is SHARD

    @property
    def rests_partial(self) -> bool:
        """Whether gradients stay unreduced until the last micro-batch."""
        return self.grads is PARTIAL

    def __str__(self) -> str:
        return f"(params {self.params.value}, grads {self.grads.value}, optim {self.optim.value})"


STAGES = {
    0: (REPLICATE, PARTIAL, REPLICATE),
    1: (REPLICATE, PARTIAL, SHARD),
    2: (REPLICATE, SHARD, SHARD),
    3: (SHARD, SHARD, SHARD),
}
