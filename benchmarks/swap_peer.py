"""DeepSpeed's aio in a process of its own; see benchmarks/peer.py. Answers {"what": "write"} with {"seconds": ...}."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

BLOCK_BYTES, QUEUE_DEPTH = 8 * 2**20, 8  # 28 settings that were tried lie within noise of it


def main(folder: str, sizes: list[int], threads: int) -> None:
    handle = AsyncIOBuilder().load().aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, threads)
    tensors = []
    for size in sizes:
        tensor = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.int8))
        tensors.append(tensor.copy_(torch.randint(-128, 128, (size,), dtype=torch.int8)))
    paths = [Path(folder, f"aio-{os.getpid()}-{number}") for number in range(len(sizes))]
    say({"ready": True})
    try:
        for line in sys.stdin:
            what = json.loads(line)["what"]
            move = handle.async_pwrite if what == "write" else handle.async_pread
            begin = time.perf_counter()
            for tensor, path in zip(tensors, paths, strict=True):
                move(tensor, str(path), 0)
            handle.wait()
            say({"seconds": time.perf_counter() - begin})
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def say(answer: dict[str, object]) -> None:
    print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
