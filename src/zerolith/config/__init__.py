"""What a training run is told: JSON in, one frozen `Config` out. Knows no torch and no processes."""

from zerolith.config.batch import resolve_batch
from zerolith.config.deepspeed import Fate
from zerolith.config.keys import KEYS, SECTIONS, TYPED_SECTIONS, Key
from zerolith.config.load import load_config
from zerolith.config.schema import Config, Note

__all__ = [
    "KEYS",
    "SECTIONS",
    "TYPED_SECTIONS",
    "Config",
    "Fate",
    "Key",
    "Note",
    "load_config",
    "resolve_batch",
]
