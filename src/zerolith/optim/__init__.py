"""Stepping stock torch optimizers on shards, and what every step needs to know first: norms and overflow."""

from zerolith.optim.build import build_optimizer as build_optimizer, build_scheduler as build_scheduler
from zerolith.optim.facade import ZeroOptimizer as ZeroOptimizer
from zerolith.optim.filling import Filling as Filling, make_filling as make_filling
from zerolith.optim.granularity import granularities_of as granularities_of
from zerolith.optim.norms import GradientFacts as GradientFacts, examine as examine
from zerolith.optim.one_pass import original as original
from zerolith.optim.partitioned import PartitionedOptimizer as PartitionedOptimizer
from zerolith.optim.pieces import is_per_element as is_per_element
