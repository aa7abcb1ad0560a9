"""What the contenders that hold tensors share: the model without values, the state's values, and knowing them again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint.job import StoreJob
from benchmarks.gpt import GPT

BLOCK_NUMEL = 2**20


def empty_model(job: StoreJob) -> GPT:
    """The model with undefined values, which cost no time and no memory until they are written."""
    with torch.device("meta"):
        model = GPT(job.shape)
    model = model.to_empty(device="cpu")
    model.head.weight = model.emb.weight  # to_empty gives each module a tensor of its own
    return model


class TensorState:
    """A state of fp32 tensors. Each has its own multiple of one random block, over and over."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._block = torch.rand(BLOCK_NUMEL, generator=generator)
        self._scaled = torch.empty(BLOCK_NUMEL)

    def tensors(self) -> Iterator[Tensor]:
        """This rank's part of the weights and of Adam's states, contiguous, always in the same order."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def fill(self) -> None:
        for part, values in self._blocks():
            part.copy_(values)

    def forget(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()

    def check(self) -> None:
        for part, values in self._blocks():
            if not torch.equal(part, values):
                raise ValueError("what was loaded is not what was saved.")

    def flush(self) -> None:
        """Nothing: `save` returns when all is written."""

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of a tensor, the values for it); the values' memory is reused."""
        for number, tensor in enumerate(self.tensors()):
            flat = tensor.detach().view(-1)
            torch.mul(self._block, 1 + number, out=self._scaled)
            for start in range(0, flat.numel(), BLOCK_NUMEL):
                part = flat[start : start + BLOCK_NUMEL]
                yield part, self._scaled[: part.numel()]
