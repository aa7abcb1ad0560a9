"""What each activation-checkpointing policy keeps, and what it costs, for the demo's GPT.

    python examples/activation_curve.py --rounds 5 --png activations.png

One process, fp32. All policies take turns, so that a machine that slows down slows all of them. Kept memory is what a
forward leaves behind for backward, by torch's profiler. On a CPU the host is the device, and `cpu_checkpointing` costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import zerolith
from gpt.model import GPT
from gpt.shape import GPTShape

POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"policy": "selective"},
    "full, every 2nd": {"policy": "full", "every": 2},
    "full": {"policy": "full"},
    "full, on the host": {"policy": "full", "cpu_checkpointing": True},
}


class Row(NamedTuple):
    """One policy's result."""

    policy: str
    kept_mb: float
    ms: float


def make_engine(shape: GPTShape, policy: dict[str, Any], batch: int) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "activation_checkpointing": policy,
    }
    return zerolith.initialize(model=GPT(shape), config=config)[0]


def kept_bytes(engine: Any, tokens: torch.Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = engine(tokens, tokens)
    events = profiler.profiler.kineto_results.events()
    engine.backward(loss)
    engine.step()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def step_seconds(engine: Any, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    engine.backward(engine(tokens, tokens))
    engine.step()
    return time.perf_counter() - start


def measure(shape: GPTShape, *, batch: int, rounds: int) -> list[Row]:
    tokens = torch.randint(shape.vocab, (batch, shape.seq_len))
    engines = {name: make_engine(shape, policy, batch) for name, policy in POLICIES.items()}
    kept = {name: kept_bytes(engine, tokens) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name].append(step_seconds(engine, tokens))
    return [Row(name, kept[name] / 1e6, 1e3 * statistics.median(times[name])) for name in engines]


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4))
    for row in rows:
        panel.scatter(row.kept_mb, row.ms, label=row.policy)
    panel.legend(loc="lower right")
    panel.set_xlabel("activations kept for backward, MB")
    panel.set_ylabel("ms per step")
    panel.set_xlim(0, 1.1 * max(row.kept_mb for row in rows))
    panel.set_ylim(0, 1.1 * max(row.ms for row in rows))
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    shape = GPTShape(layers=6, seq_len=options.seq_len)
    rows = measure(shape, batch=options.batch, rounds=options.rounds)
    print("| policy | kept, MB | of all | ms per step | of none |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        share, slower = row.kept_mb / rows[0].kept_mb, row.ms / rows[0].ms
        print(f"| {row.policy} | {row.kept_mb:.1f} | {share:.2f} | {row.ms:.0f} | {slower:.2f} |")
    if options.png is not None:
        draw(rows, options.png)


if __name__ == "__main__":
    main()
