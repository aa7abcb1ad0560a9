"""One AdamW step over a flat array on the CPU: torch, DeepSpeed, ours, and a mere copy of the same arrays.

    python -m benchmarks.cpu_adam --numel 100e6,400e6 [--deepspeed-python PATH] [--json FILE] [--markdown FILE]

Two cases. fp32: an fp32 gradient, no weights out. bf16: a bf16 gradient, and bf16 weights out; torch and DeepSpeed take
three passes there. The copy reads and writes the same arrays of the same dtypes and computes nothing: what memory
allows. All contenders take turns, in an order that changes every round; ratios are taken within a round. All memory is
touched before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.measure import git_state, hardware, shown_command
from benchmarks.peer import Peer
from zerolith import kernels
from zerolith.kernels import native
from zerolith.kernels.arrays import Arrays

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
TIMES = 3  # passes in a turn; three copies leave all arrays as they were
BYTES = {"fp32": 28, "bf16": 28}  # per parameter: w, m, v there and back, and g 4, or g 2 and weights 2
OPTIONS = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
COPY, OURS, FUSED = "copy", "zerolith", "torch fused"

Turn = Callable[[], float]  # seconds of one pass


class Memory:
    """The arrays that all contenders of this process work on, one after the other."""

    def __init__(self, numel: int) -> None:
        torch.manual_seed(0)
        self.param = nn.Parameter(torch.randn(numel))
        self.exp_avg = torch.randn(numel).mul_(1e-3)
        self.exp_avg_sq = torch.rand(numel).mul_(1e-6).add_(1e-9)
        self.grad = torch.randn(numel).mul_(1e-3)
        self.small_grad = self.grad.bfloat16()
        self.weights = torch.zeros(numel, dtype=torch.bfloat16)

    @property
    def master(self) -> Tensor:
        return self.param.detach()

    def arrays(self, case: str) -> Arrays:
        states = (self.exp_avg, self.exp_avg_sq)
        if case == "fp32":
            return Arrays(master=self.master, states=states, grad=self.grad)
        return Arrays(master=self.master, states=states, grad=self.small_grad, out=self.weights)


def timed(work: Callable[[], None]) -> Turn:
    def turn() -> float:
        start = time.perf_counter()
        for _ in range(TIMES):
            work()
        return (time.perf_counter() - start) / TIMES

    return turn


def torch_contender(memory: Memory, case: str, **how: bool) -> Turn:
    """torch.optim.AdamW; in bf16 between a copy that widens the gradient and one that rounds the weights."""
    memory.param.grad = memory.grad
    optimizer = torch.optim.AdamW([memory.param], **OPTIONS, **how)
    step = torch.tensor(100.0)
    optimizer.state[memory.param] = {"step": step, "exp_avg": memory.exp_avg, "exp_avg_sq": memory.exp_avg_sq}

    def fp32() -> None:
        optimizer.step()

    def bf16() -> None:
        memory.grad.copy_(memory.small_grad)
        optimizer.step()
        memory.weights.copy_(memory.master)

    return timed(fp32 if case == "fp32" else bf16)


def our_contender(memory: Memory, case: str, threads: int) -> Turn:
    arrays = memory.arrays(case)

    def step() -> None:
        kernels.adamw(arrays.master, *arrays.states, arrays.grad, out=arrays.out, step=100, threads=threads, **OPTIONS)

    return timed(step)


def copy_contender(memory: Memory, case: str, threads: int) -> Turn:
    library = native.load()
    arrays = memory.arrays(case)
    return timed(lambda: library.copy(arrays, threads=threads))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case. Medians over rounds; ratios are of times within a round."""

    numel: int
    case: str
    contender: str
    ms: float
    best_ms: float
    gb_per_s: float
    of_copy: float  # speed as a part of the copy's
    to_fused: float  # times as fast as torch's fused step
    samples_ms: list[float]


def contenders(memory: Memory, case: str, threads: int, peer: Peer | None) -> dict[str, Turn]:
    found = {
        "torch loop": torch_contender(memory, case, foreach=False, fused=False),
        "torch foreach": torch_contender(memory, case, foreach=True),
        FUSED: torch_contender(memory, case, fused=True),
        OURS: our_contender(memory, case, threads),
        COPY: copy_contender(memory, case, threads),
    }
    if peer is not None:
        found["DeepSpeed CPUAdam"] = lambda: float(peer.ask({"case": case, "times": TIMES})["seconds"])
    return found


def compare(turns: Mapping[str, Turn], rounds: int, numel: int, case: str) -> list[Row]:
    """Take turns: `rounds` counted ones after one to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            seconds = turns[name]()
            if number > 0:
                samples[name].append(seconds)
    rows = []
    for name, mine in samples.items():
        ratios = {
            other: median(base / own for base, own in zip(samples[other], mine, strict=True)) for other in (COPY, FUSED)
        }
        rows.append(
            Row(
                numel=numel,
                case=case,
                contender=name,
                ms=median(mine) * 1e3,
                best_ms=min(mine) * 1e3,
                gb_per_s=BYTES[case] * numel / median(mine) / 1e9,
                of_copy=ratios[COPY],
                to_fused=ratios[FUSED],
                samples_ms=[sample * 1e3 for sample in mine],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| parameters | case | contender | ms | best ms | GB/s | of the copy's speed | times torch fused |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.numel / 1e6:.0f} M | {row.case} | {row.contender} | {row.ms:.1f} | {row.best_ms:.1f} | "
            f"{row.gb_per_s:.1f} | {row.of_copy:.0%} | {row.to_fused:.2f} |"
        )
    return "\n".join(lines)


def run(numel: int, arguments: argparse.Namespace) -> list[Row]:
    memory = Memory(numel)
    peer = None
    if arguments.deepspeed_python:
        facts = {"numel": numel, "threads": arguments.threads}
        peer = Peer(arguments.deepspeed_python, Path(__file__).with_name("cpu_adam_peer.py"), facts)
    try:
        return [
            row
            for case in ("fp32", "bf16")
            for row in compare(contenders(memory, case, arguments.threads, peer), arguments.rounds, numel, case)
        ]
    finally:
        if peer is not None:
            peer.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", default="100e6,400e6", help="parameters, several by commas; 20 bytes each, twice")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deepspeed-python", default="", help="an interpreter with DeepSpeed; without it, no column")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu_adam.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "cpu_adam.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    rows = [row for numel in arguments.numel.split(",") for row in run(int(float(numel)), arguments)]
    library = native.load()
    facts = {
        "command": shown_command("benchmarks.cpu_adam", sys.argv[1:]),
        "hardware": hardware(),
        "torch": torch.__version__,
        "instruction_set": library.instruction_set,
        "threads": arguments.threads,
        "load": os.getloadavg(),
        **git_state(ROOT),
    }
    note = (
        f"* {facts['command']}\n* {hardware()['cpu']}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{library.instruction_set}; {arguments.rounds} rounds of {TIMES} passes, "
        f"medians; load {os.getloadavg()[1]:.1f}\n"
        "* GB/s counts 28 bytes per parameter, which is what a single pass must move in both cases.\n"
        + ("" if arguments.deepspeed_python else "* DeepSpeed was not measured (--deepspeed-python).\n")
    )
    arguments.json.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    arguments.markdown.write_text(f"**A step of AdamW on the CPU**\n\n{table(rows)}\n\n{note}")
    print(table(rows))


if __name__ == "__main__":
    main()
