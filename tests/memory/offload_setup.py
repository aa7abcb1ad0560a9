"""A small model whose layers keep what they keep on the host, and lanes that tell what went on there."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerolith.checkpointing import Options, checkpoint_blocks
from zerolith.hooks import in_backward
from zerolith.memory.lane import AtOnce, Copier, Lane, Parcel
from zerolith.memory.offload import Offload

ROWS, WIDTH, LAYERS = 6, 8, 4
Log = list[tuple[str, int]]


class Recorder(Lane):
    """Writes down what it is asked for, with the number of the block that saved the tensor first."""

    def __init__(self, device: torch.device, copier: Copier, log: Log) -> None:
        super().__init__(device, copier)
        self.log = log
        self.parcels: weakref.WeakSet[Parcel] = weakref.WeakSet()
        self.here: list[list[int]] = []  # at each use: the blocks of which something is on the device

    def to_host(self, tensor: Tensor) -> Parcel:
        parcel = super().to_host(tensor)
        self.parcels.add(parcel)
        self.log.append(("out", tensor.nbytes))
        return parcel

    def start_back(self, parcel: Parcel) -> None:
        if parcel.here is None:
            self.log.append(("start", parcel.home))
        super().start_back(parcel)

    def finish_back(self, parcel: Parcel) -> Tensor:
        self.log.append(("use", parcel.home))
        self.here.append(sorted({each.home for each in self.parcels if each.here is not None}))
        return super().finish_back(parcel)


class Late:
    """Copies that are made when somebody waits for them, and not before, in the order in which they were asked for.

    On a GPU they are made somewhere between now and then: between AtOnce and this lies all that can happen there. Like
    a GPU this keeps no memory alive: what was freed before its copy was made gets none.
    """

    needs_pinned = False

    def __init__(self) -> None:
        self.queue: deque[tuple[object, weakref.ref[Tensor], weakref.ref[Tensor]]] = deque()

    def start(self, target: Tensor, source: Tensor) -> object:
        copy = object()
        self.queue.append((copy, weakref.ref(target), weakref.ref(source)))
        return copy

    def wait(self, copy: object) -> None:
        while not self.is_done(copy):
            target, source = (reference() for reference in self.queue.popleft()[1:])
            if target is not None and source is not None:
                target.copy_(source)

    finish = wait

    def is_done(self, copy: object) -> bool:
        return all(copy is not each for each, _, _ in self.queue)


class Layer(nn.Module):
    """Says when it computes, and whether it does so in backward."""

    def __init__(self, number: int, log: Log, dropout: float) -> None:
        super().__init__()
        self.number, self.log, self.dropout = number, log, dropout
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.failing = ""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        phase = "backward" if in_backward() else "forward"
        self.log.append((phase, self.number))
        if self.failing == phase:
            raise ArithmeticError(phase)
        y = self.down(F.gelu(self.up(x)))
        y = y if mask is None else y * mask
        return x + F.dropout(y, self.dropout)


class Stack(nn.Module):
    def __init__(self, log: Log, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(number, log, dropout) for number in range(1, LAYERS + 1))

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, *masks)
        return x.square().sum()


class Setup:
    """A stack whose layers keep what they keep on the host, the way of `policy`, and what went on there."""

    def __init__(self, policy: str, copier: type = AtOnce, *, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.log: Log = []
        self.model = Stack(self.log, dropout)
        self.offload = Offload(min_bytes=0, make_lane=lambda device: Recorder(device, copier(), self.log))
        if policy == "none":
            for layer in self.model.layers:
                layer.forward = offloaded(self.offload, layer.forward)
        elif policy != "all on the device":
            options = Options(selective=policy == "selective", offload=self.offload)
            checkpoint_blocks(self.model, options=options)

    @property
    def lane(self) -> Recorder:
        return self.offload.lanes[torch.device("cpu")]

    def loss(self, seed: int = 1, *masks: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return self.model(torch.randn(ROWS, WIDTH), *masks)

    def gradients(self) -> list[Tensor]:
        found = [param.grad for param in self.model.parameters()]
        self.model.zero_grad()
        return found

    def count(self, what: str) -> int:
        return sum(event == what for event, _ in self.log)

    def is_empty(self) -> bool:
        """Whether nothing is left: neither host memory in use, nor a block, nor a tensor on the device."""
        left = self.lane.pool.used_bytes, len(self.offload._blocks), len(self.offload._known)
        return left == (0, 0, 0) and not self.lane._in_flight

    def after_an_exception_is_empty(self) -> bool:
        """The same; copies under way that nobody waits for any more are waited for when a backward ends."""
        gc.collect()  # an exception and its traceback hold each other
        self.lane.settle()
        return self.is_empty()


def offloaded(offload: Offload, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        with offload.block().hooks():
            return forward(*args)

    return run


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def expected(seed: int = 1, *, dropout: float = 0.0) -> list[Tensor]:
    setup = Setup("all on the device", dropout=dropout)
    setup.loss(seed).backward()
    return setup.gradients()
