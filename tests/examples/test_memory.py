"""The formulas of ZeRO, in bytes per parameter."""

from __future__ import annotations

import pytest
import torch

from gpt.memory import STAGES, bytes_at_stage, peak_bytes


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"), [(0, 2 + 4 + 12), (1, 2 + 4 + 3), (2, 2 + 1 + 3), (3, 0.5 + 1 + 3)]
)
def test_mixed_precision_on_four_ranks(stage: int, bytes_per_parameter: float) -> None:
    state = bytes_at_stage(stage, num_parameters=1000, ranks=4, precision="bf16")
    assert state.total == pytest.approx(1000 * bytes_per_parameter)


def test_full_precision_needs_no_master() -> None:
    state = bytes_at_stage(0, num_parameters=1000, ranks=1, precision="fp32")
    assert state == (4000, 4000, 8000)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_rank_gains_nothing_and_several_gain_at_every_stage(precision: str) -> None:
    alone = [bytes_at_stage(stage, num_parameters=9, ranks=1, precision=precision).total for stage in STAGES]
    shared = [bytes_at_stage(stage, num_parameters=9, ranks=3, precision=precision).total for stage in STAGES]
    assert len({*alone}) == 1
    assert shared == sorted(shared, reverse=True)
    assert len({*shared}) == len(STAGES)


def test_a_process_has_used_some_memory() -> None:
    assert peak_bytes(torch.device("cpu")) > 2**20
