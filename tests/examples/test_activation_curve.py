"""The curve of activation checkpointing is drawn from what was measured."""

from __future__ import annotations

from pathlib import Path

import activation_curve
from gpt.shape import GPTShape


def test_policies_keep_less_and_less_and_are_drawn(tmp_path: Path) -> None:
    rows = activation_curve.measure(GPTShape(layers=2, seq_len=64), batch=2, rounds=1)
    kept = {row.policy: row.kept_mb for row in rows}
    assert list(kept) == list(activation_curve.POLICIES)
    assert kept["full"] < kept["full, every 2nd"] < kept["selective"] < kept["none"]
    activation_curve.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
