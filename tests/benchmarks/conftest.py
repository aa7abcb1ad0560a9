"""Makes the repository's `benchmarks` package importable from the tests.

This folder has the package's name, so pytest may have registered it as a namespace package `benchmarks`.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])

if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
if getattr(sys.modules.get("benchmarks"), "__file__", None) is None:
    sys.modules.pop("benchmarks", None)
