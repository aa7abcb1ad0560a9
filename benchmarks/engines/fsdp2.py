"""torch fully_shard per block and on the root. bf16: bf16 parameters and compute, fp32 reduction."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.engines.torch_engine import TorchEngine, rendezvous
from benchmarks.gpt import GPT
from benchmarks.job import Job

__all__ = ["build", "rendezvous"]

POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


def build(job: Job, model: nn.Module, device: torch.device, *, reshard: bool) -> TorchEngine:
    """`reshard`: free a block's gathered parameters after its forward."""
    if not isinstance(model, GPT):
        raise TypeError(f"fully_shard is applied per block of a GPT, not to a {type(model).__name__}.")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    policy = POLICIES[job.dtype]
    model = model.to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # None: torch's default for the root, which keeps it gathered until its backward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if reshard else False)
    return TorchEngine(model, job, device, autocast=None)
