"""Makes the examples' own package importable, as running `examples/pretrain_gpt.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

sys.path.insert(0, str(EXAMPLES))
