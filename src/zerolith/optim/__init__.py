"""Stepping stock torch optimizers on shards, and what every step needs to know first: norms and overflow."""

from zerolith.optim.build import build_optimizer, build_scheduler
from zerolith.optim.facade import ZeroOptimizer
from zerolith.optim.granularity import granularity_of
from zerolith.optim.norms import GradientFacts, examine
from zerolith.optim.partitioned import PartitionedOptimizer

__all__ = [
    "GradientFacts",
    "PartitionedOptimizer",
    "ZeroOptimizer",
    "build_optimizer",
    "build_scheduler",
    "examine",
    "granularity_of",
]
