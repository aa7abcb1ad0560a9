"""One run in a process of its own: some steps of one model by one contender. Answers with one line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.llama import Llama
from benchmarks.gpu.shapes import Shape

CONTENDERS = (  # those that matter most first: time may not suffice for all
    "zerolith", "zerolith-states", "fsdp2", "fsdp2-offload", "zerolith-all", "zerolith-guess", "zerolith-backward",
)  # fmt: skip
LR = 1e-5


@dataclass(frozen=True, kw_only=True)
class Run:
    contender: str
    shape: Shape
    device: str
    seq: int
    micro_batch: int
    micro_batches: int  # per step
    steps: int  # counted ones, after one to warm up
    policy: str  # of activation checkpointing: none, selective or full

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Run:
        fields = json.loads(text)
        return Run(**{**fields, "shape": Shape(**fields["shape"])})


Step = Callable[[list[Tensor]], float]  # micro-batches of a step; the last one's loss


def zerolith_step(run: Run) -> Step:
    import zerolith

    host: dict[str, Any] = {"device": "cpu"}
    offload: dict[str, dict[str, Any]] = {
        "zerolith": {},
        "zerolith-states": {"offload_optimizer": host},
        "zerolith-backward": {"offload_optimizer": {**host, "overlap": "backward"}},
        "zerolith-guess": {"offload_optimizer": {**host, "overlap": "backward"}},  # the same, with clipping
        "zerolith-all": {"offload_optimizer": host, "offload_param": host},
    }
    config = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.micro_batches,
        "gradient_clipping": 0.0 if run.contender == "zerolith-backward" else 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "zero_optimization": {"stage": 3, **offload[run.contender]},
        "activation_checkpointing": {"policy": run.policy, "classes": ["Block"]},
        "zerolith": {"unit_classes": ["Block"]},
    }
    with torch.device(run.device), zerolith.zero.Init(config_dict_or_path=config):
        model = Llama(run.shape, run.seq)
    engine = zerolith.initialize(model=model, config=config)[0]

    def step(pieces: list[Tensor]) -> float:
        for piece in pieces:
            loss = engine(piece)
            engine.backward(loss)
            engine.step()
        return loss.item()

    return step


def fsdp2_step(run: Run) -> Step:
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.utils.checkpoint import checkpoint

    cuda = run.device == "cuda"
    offloads = run.contender.endswith("offload")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method="tcp://127.0.0.1:29671", rank=0, world_size=1
    )
    mesh = dist.init_device_mesh(run.device, (1,))
    with torch.device("cpu" if offloads else run.device):
        model = Llama(run.shape, run.seq)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = CPUOffloadPolicy(pin_memory=cuda) if offloads else OffloadPolicy()
    for block in model.blocks:
        if run.policy != "none":
            block.forward = _checkpointed(block.forward, checkpoint)
        fully_shard(block, mesh=mesh, mp_policy=mixed, offload_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(pieces: list[Tensor]) -> float:
        for piece in pieces:
            loss = model(piece) / len(pieces)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() * len(pieces)

    return step


def _checkpointed(forward: Any, checkpoint: Any) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def measured(run: Run) -> dict[str, Any]:
    device = torch.device(run.device)
    torch.manual_seed(0)
    begin = time.perf_counter()
    step = fsdp2_step(run) if run.contender.startswith("fsdp2") else zerolith_step(run)
    start_s = time.perf_counter() - begin
    generator = torch.Generator().manual_seed(1)
    samples, losses = [], []
    for number in range(run.steps + 1):
        shape = (run.micro_batches, run.micro_batch, run.seq + 1)
        tokens = torch.randint(0, run.shape.vocab, shape, generator=generator).to(device)
        begin = time.perf_counter()
        losses.append(step(list(tokens)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            samples.append(time.perf_counter() - begin)
    tokens_per_step = run.micro_batches * run.micro_batch * run.seq
    tokens_per_s = tokens_per_step / median(samples)
    return {
        "start_s": start_s,
        "samples_s": samples,
        "losses": losses,
        "tokens_per_s": tokens_per_s,
        "tflop_per_s": tokens_per_s * run.shape.flops_per_token(run.seq) / 1e12,
        "device_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    print("@" + json.dumps(measured(Run.from_json(sys.argv[1]))), flush=True)
