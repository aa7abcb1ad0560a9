"""What a training run is told: JSON in, one frozen `Config` out. Knows no torch and no processes."""

from zerolith.config.batch import resolve_batch as resolve_batch
from zerolith.config.keys import (
    KEYS as KEYS,
    SECTIONS as SECTIONS,
    TYPED_SECTIONS as TYPED_SECTIONS,
    Fate as Fate,
    Key as Key,
)
from zerolith.config.load import load_config as load_config
from zerolith.config.schema import (
    Config as Config,
    FlopsProfiler as FlopsProfiler,
    Note as Note,
    TraceSteps as TraceSteps,
)
