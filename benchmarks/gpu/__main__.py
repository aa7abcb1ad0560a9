"""Floors, checks, speed by size, and the largest model of one GPU, in a given time.

    python -m benchmarks.gpu                                     # on a machine with a GPU
    python -m benchmarks.gpu --device cpu --sizes tiny --seq 64  # to see that the script works

Every model is trained in a process of its own, so one that does not fit costs no other its memory; what did not fit,
or took too long, is in the table as that. A contender trains all sizes before the next one begins, so that those that
are named first have figures if time ends; results are written after each. MFU is of the peak that `--peak-tflops` says
(H100 and H200: 989 dense bf16).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import SIZES, deeper
from benchmarks.gpu.worker import CONTENDERS, Run
from benchmarks.measure import default_device, git_state, hardware, shown_command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "MemoryError", "has no room", "-9")


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + minutes * 60

    def left(self, most: float) -> float:
        return min(most, self.end - time.monotonic())


def attempt(run: Run, limit_s: float) -> dict[str, Any]:
    """What the worker measured, or why it did not."""
    if limit_s < 10:
        return {"failed": "no time left"}
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", "benchmarks.gpu.worker", run.to_json()]
    try:
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit_s:.0f} s"}
    for line in ended.stdout.splitlines():
        if line.startswith("@"):
            return json.loads(line[1:])
    told = f"{ended.stderr[-4000:]} {ended.returncode}"
    is_memory = any(words in told for words in OUT_OF_MEMORY)
    last = ended.stderr.strip().splitlines()[-1:] or [f"status {ended.returncode}"]
    return {"failed": "out of memory" if is_memory else last[0][:200]}


def checks(clock: Clock) -> dict[str, Any]:
    """The tests that need a GPU; a file of tests that cannot be read here ends no others."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "tests"]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, clock.left(150)), check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "tail": "not done in time"}
    return {"status": ended.returncode, "tail": "\n".join(ended.stdout.strip().splitlines()[-15:])}


def largest(run: Run, clock: Clock, *, start: int) -> dict[str, Any]:
    """The most layers with which five steps are taken: doubled until it fails, then halved in between."""
    fits, fails, tried = 0, None, []
    layers = start
    while clock.left(120) > 30 and (fails is None or fails - fits > max(1, fits // 16)):
        candidate = replace(run, shape=deeper(run.shape, layers), steps=4)
        found = attempt(candidate, clock.left(240))
        tried.append({"layers": layers, "params": candidate.shape.num_params, **found})
        if "failed" in found:
            fails = layers
        else:
            fits = layers
        layers = fits * 2 if fails is None else (fits + fails) // 2
        if layers in (fits, 0):
            break
    params = deeper(run.shape, fits).num_params if fits else 0
    return {"contender": run.contender, "layers": fits, "params": params, "tried": tried}


def table(rows: list[dict[str, Any]], peak_tflops: float) -> str:
    lines = [
        "| model | contender | tokens/s | step s | MFU | of no offload | device GB | host GB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = {row["size"]: row["tokens_per_s"] for row in rows if row["contender"] == "zerolith" and "failed" not in row}
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['size']} | {row['contender']} | {row['failed']} | | | | | |")
            continue
        ratio = f"{row['tokens_per_s'] / base[row['size']]:.2f}" if row["size"] in base else ""
        device = f"{row['device_peak_gb']:.1f}" if row["device_peak_gb"] is not None else ""
        step = sorted(row["samples_s"])[len(row["samples_s"]) // 2]
        lines.append(
            f"| {row['size']} | {row['contender']} | {row['tokens_per_s']:.0f} | {step:.2f} | "
            f"{row['tflop_per_s'] / peak_tflops:.0%} | {ratio} | {device} | {row['host_peak_gb']:.1f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    parser.add_argument("--sizes", default="1.5b,7b,8b,13b", help=", ".join(SIZES))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--policy", default="full", choices=("none", "selective", "full"), help="checkpointing")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--no-checks", action="store_true", help="leave the tests out")
    parser.add_argument("--largest-from", type=int, default=0, help="layers of the 8b model to begin the search with")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "gpu.md")
    return parser.parse_args()


def main() -> None:
    arguments, facts = parse(), {}
    clock = Clock(arguments.minutes)
    facts["command"] = shown_command("benchmarks.gpu", sys.argv[1:])
    facts |= {"hardware": hardware(), **git_state(ROOT)}
    small = arguments.device == "cpu"
    floors = (
        "import json, torch; from benchmarks.gpu.floors import measure; "
        f"print(json.dumps(measure(torch.device({arguments.device!r}){', mib=64, width=256' if small else ''})))"
    )
    told = subprocess.run([sys.executable, "-c", floors], cwd=ROOT, capture_output=True, text=True, check=True)
    facts["floors"] = json.loads(told.stdout.splitlines()[-1])
    print(json.dumps(facts["floors"], indent=1), flush=True)
    if not arguments.no_checks:
        facts["checks"] = checks(clock)
        print(facts["checks"]["tail"], flush=True)
    micro_batches = max(1, arguments.tokens // (arguments.micro_batch * arguments.seq))
    rows: list[dict[str, Any]] = []

    def run_of(size: str, contender: str) -> Run:
        return Run(
            contender=contender,
            shape=SIZES[size],
            device=arguments.device,
            seq=arguments.seq,
            micro_batch=arguments.micro_batch,
            micro_batches=micro_batches,
            steps=arguments.steps,
            policy=arguments.policy,
        )

    most = None
    for contender in arguments.contenders.split(","):
        for size in arguments.sizes.split(","):
            found = attempt(run_of(size, contender), clock.left(180))
            rows.append({"size": size, "contender": contender, **found})
            print(table(rows[-1:], arguments.peak_tflops).splitlines()[-1], flush=True)
            write(arguments, facts, rows, most)
    if arguments.largest_from:
        size = "tiny" if small else "8b"
        most = largest(run_of(size, "zerolith-all"), clock, start=arguments.largest_from)
        print(f"largest: {most['layers']} layers, {most['params'] / 1e9:.2f} B parameters", flush=True)
    print(write(arguments, facts, rows, most))


def write(
    arguments: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]], most: dict[str, Any] | None
) -> str:
    """What is known so far, to both files; returns the table, a size after the other."""
    sizes = arguments.sizes.split(",")
    text = table(sorted(rows, key=lambda row: sizes.index(row["size"])), arguments.peak_tflops)
    floor_lines = "\n".join(f"* {name}: {value:.1f}" for name, value in facts["floors"].items())
    note = f"\n\n{floor_lines}\n* {facts['command']}\n"
    if most is not None:
        note += f"* largest model that takes five steps: {most['params'] / 1e9:.2f} B ({most['layers']} layers)\n"
    arguments.markdown.write_text(f"**One GPU, with and without offload**\n\n{text}{note}")
    arguments.json.write_text(json.dumps({"facts": facts, "rows": rows, "largest": most}, indent=1) + "\n")
    return text


if __name__ == "__main__":
    main()
