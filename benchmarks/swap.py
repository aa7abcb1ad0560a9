"""Tensors to disk and back: the swap file of `device: nvme`, plain parallel O_DIRECT, DeepSpeed's aio.

    python -m benchmarks.swap --folder /local/nvme [--deepspeed-python PATH] [--json FILE] [--markdown FILE]

Every contender moves the same bytes, in tensors of one size, between memory that has been touched and a file of its
own in one folder. Plain means: as many threads as ours, each with a block of 4 MiB at a time, and nothing else: no
copy, no checksum. Writes are O_DIRECT everywhere, so no page cache takes part; as in training, nobody syncs. All take
turns, in an order that changes every round; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.checkpoint.disk import file_system
from benchmarks.measure import git_state, hardware, shown_command
from benchmarks.peer import Peer
from zerolith.memory import SwapFile
from zerolith.memory.pages import ask_for_huge_pages, page_buffer
from zerolith.memory.swap import BLOCK_BYTES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
WRITE, READ = "write", "read"
PLAIN, OURS = "plain O_DIRECT", "zerolith"

Turn = Callable[[str], float]  # seconds of one pass over all tensors, written or read


class Plain:
    """Threads that move blocks, and nothing else."""

    def __init__(self, folder: Path, *, sizes: list[int], threads: int) -> None:
        self.tensors = [page_buffer(size) for size in sizes]
        for tensor in self.tensors:
            for start in range(0, len(tensor), BLOCK_BYTES):
                tensor[start : start + BLOCK_BYTES] = os.urandom(len(tensor[start : start + BLOCK_BYTES]))
        self.file = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600)
        self.pool = ThreadPoolExecutor(threads)

    def turn(self, what: str) -> float:
        move = os.pwritev if what == WRITE else os.preadv
        begin, at, moves = time.perf_counter(), 0, []
        for tensor in self.tensors:
            for start in range(0, len(tensor), BLOCK_BYTES):
                block = tensor[start : start + BLOCK_BYTES]
                moves.append(self.pool.submit(move, self.file, [block], at + start))
            at += len(tensor)
        if sum(each.result() for each in moves) != at:
            raise OSError("a transfer was short.")
        return time.perf_counter() - begin


class Ours:
    """A swap file as the optimizer uses it, one tensor at a time."""

    def __init__(self, folder: Path, *, sizes: list[int], threads: int) -> None:
        self.swap = SwapFile(folder, threads=threads)
        if not self.swap.is_direct:
            raise OSError(f"{folder}: no O_DIRECT here; choose a folder on a disk.")
        self.tensors = [torch.empty(size, dtype=torch.int8) for size in sizes]
        for tensor in self.tensors:
            ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)  # as for what is swapped
            tensor.random_(-128, 128)
        self.regions = [self.swap.add(size) for size in sizes]

    def turn(self, what: str) -> float:
        move = self.swap.write if what == WRITE else self.swap.read
        begin = time.perf_counter()
        pairs = zip(self.regions, self.tensors, strict=True)
        for transfer in [move(region, tensor.untyped_storage()) for region, tensor in pairs]:
            transfer.wait()
        return time.perf_counter() - begin

    def check(self, before: list[Tensor]) -> None:
        if not all(torch.equal(*pair) for pair in zip(self.tensors, before, strict=True)):
            raise ValueError("what was read is not what was written.")


def compare(turns: dict[str, Turn], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender and direction: `rounds` counted ones after one to warm up."""
    samples: dict[str, dict[str, list[float]]] = {name: {WRITE: [], READ: []} for name in turns}
    order = list(turns)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            for what in (WRITE, READ):
                seconds = turns[name](what)
                if number > 0:
                    samples[name][what].append(seconds)
    return samples


def table(samples: dict[str, dict[str, list[float]]], nbytes: int) -> str:
    lines = [
        "| contender | write GB/s | of plain | read GB/s | of plain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, mine in samples.items():
        cells = []
        for what in (WRITE, READ):
            ratio = median(base / own for base, own in zip(samples[PLAIN][what], mine[what], strict=True))
            cells += [f"{nbytes / median(mine[what]) / 1e9:.2f}", f"{ratio:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="on the disk to measure")
    parser.add_argument("--tensor-mib", type=int, default=85, help="of one tensor; a block's states at 125 M")
    parser.add_argument("--tensors", type=int, default=12)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--deepspeed-python", default="", help="an interpreter with DeepSpeed and libaio")
    parser.add_argument("--json", type=Path, default=RESULTS / "swap.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "swap.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = [arguments.tensor_mib * 2**20] * arguments.tensors
    options = {"sizes": sizes, "threads": arguments.threads}
    ours, plain = Ours(arguments.folder, **options), Plain(arguments.folder, **options)
    before = [tensor.clone() for tensor in ours.tensors]
    turns: dict[str, Turn] = {PLAIN: plain.turn, OURS: ours.turn}
    peer = None
    if arguments.deepspeed_python:
        facts = {"folder": str(arguments.folder), **options}
        peer = Peer(arguments.deepspeed_python, Path(__file__).with_name("swap_peer.py"), facts)
        turns["DeepSpeed aio"] = lambda what: float(peer.ask({"what": what})["seconds"])
    try:
        samples = compare(turns, arguments.rounds)
    finally:
        if peer is not None:
            peer.close()
    ours.check(before)
    nbytes = sum(sizes)
    facts = {
        "command": shown_command("benchmarks.swap", sys.argv[1:]),
        "hardware": hardware(),
        "file_system": file_system(arguments.folder),
        "bytes": nbytes,
        "load": os.getloadavg(),
        **git_state(ROOT),
    }
    note = (
        f"* {facts['command']}\n* {hardware()['cpu']}, {hardware()['cores']} cores, {facts['file_system']}; "
        f"{nbytes / 1e9:.2f} GB in {len(sizes)} tensors, {arguments.threads} threads, {arguments.rounds} rounds, "
        "medians\n"
    )
    text = f"**Tensors to disk and back**\n\n{table(samples, nbytes)}\n\n{note}"
    arguments.json.write_text(json.dumps({"facts": facts, "seconds": samples}, indent=1) + "\n")
    arguments.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
