"""DeepSpeed's CPU Adam in a process of its own; see benchmarks/peer.py.

Answers {"case": ..., "times": ...} with {"seconds": ...} of one pass.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam


def main(numel: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel))
    grad = torch.randn(numel).mul_(1e-3)
    small_grad, weights = grad.bfloat16(), torch.zeros(numel, dtype=torch.bfloat16)
    optimizer = DeepSpeedCPUAdam([param], lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, adamw_mode=True)
    param.grad = grad

    def fp32() -> None:
        optimizer.step()

    def bf16() -> None:
        grad.copy_(small_grad)
        optimizer.step()
        weights.copy_(param.detach())

    cases = {"fp32": fp32, "bf16": bf16}
    for case in cases.values():
        case()
    say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        start = time.perf_counter()
        for _ in range(order["times"]):
            cases[order["case"]]()
        say({"seconds": (time.perf_counter() - start) / order["times"]})


def say(answer: dict[str, object]) -> None:
    print("@" + json.dumps(answer), flush=True)  # DeepSpeed prints lines of its own


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
