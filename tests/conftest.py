"""What every test run needs: one thread per process, and markers that do what they say."""

from __future__ import annotations

import os

# Tests fork ranks; a child of a process with several threads may wait for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

# No test is timed: a busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
