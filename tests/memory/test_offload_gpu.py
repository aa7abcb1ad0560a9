"""On a CUDA GPU: the same bits, the memory that was promised, and copies that hide behind computing."""

from __future__ import annotations

import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerolith.checkpointing import Options, checkpoint_blocks
from zerolith.memory.lane import Beside, Lane
from zerolith.memory.offload import Offload

pytestmark = pytest.mark.gpu
LAYERS = 6


class Timed(Beside):
    """Notes when each copy began and ended on its stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.stream.record_event(began)
        copy = super().start(target, source)
        self.stream.record_event(ended)
        self.spans.append((began, ended))
        return copy

    def copying_ms(self) -> float:
        torch.cuda.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in self.spans)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)


def make_lane(copiers: list[Timed], device: torch.device) -> Lane:
    copiers.append(Timed(device))
    return Lane(device, copiers[-1])


class Model(nn.Module):
    def __init__(self, width: int, policy: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.to("cuda", torch.bfloat16)
        self.copiers: list[Timed] = []
        self.offload = Offload(make_lane=partial(make_lane, self.copiers))
        self.hooked = policy == "without checkpoints"
        where, _, how = policy.partition(" ")
        if where in ("full", "selective"):
            offload = self.offload if how == "on the host" else None
            checkpoint_blocks(self, options=Options(selective=where == "selective", offload=offload))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.hooked:
                with self.offload.block().hooks():
                    x = layer(x)
            else:
                x = layer(x)
        return x.float().square().mean()

    def gradients(self) -> list[Tensor]:
        found = [param.grad for param in self.parameters()]
        self.zero_grad()
        return found


def make_input(width: int, rows: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("policy", ["full on the host", "selective on the host", "without checkpoints"])
def test_gradients_are_the_same_bits_and_memory_is_pinned_once(policy: str) -> None:
    models = [Model(512, "on the device"), Model(512, policy)]
    x = make_input(512, 4096)
    for step in range(4):
        gradients = []
        for model in models:
            torch.manual_seed(step)
            model(x + step).backward()
            gradients.append(model.gradients())
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True)), step
        (lane,) = models[1].offload.lanes.values()
        assert lane.pool.used_bytes == 0
        if step == 0:
            num_allocated = lane.pool.num_allocated
    assert lane.pool.num_allocated == num_allocated
    assert lane.pool.take(x.nbytes).is_pinned()


def test_a_retained_graph_and_two_forwards_before_two_backwards() -> None:
    plain, model = Model(512, "on the device"), Model(512, "full on the host")
    inputs = [make_input(512, 4096) + number for number in range(2)]
    gradients = []
    for each in (plain, model):
        torch.manual_seed(0)
        losses = [each(x) for x in inputs]
        losses[1].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
        gradients.append(each.gradients())
        del losses
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_is_kept_leaves_the_device() -> None:
    kept = {}
    x = make_input(1024, 8192)
    for policy in ("full on the device", "full on the host"):
        model = Model(1024, policy)
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            loss = model(x)
            kept[policy] = torch.cuda.memory_allocated() - before
            loss.backward()
            model.zero_grad()
        del loss, model
    spared = kept["full on the device"] - kept["full on the host"]
    assert spared == pytest.approx((LAYERS - 1) * x.nbytes, rel=0.1), "all inputs of layers but the last's"


def test_copies_hide_behind_computing() -> None:
    width, rows, steps = 4096, 8192, 7
    x = make_input(width, rows)
    step_ms: dict[str, float] = {}
    copying_ms = 0.0
    for policy in ("full on the device", "full on the host"):
        model = Model(width, policy)
        taken = []
        for _ in range(steps):
            for copier in model.copiers:
                copier.spans.clear()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            model(x).backward()
            ended.record()
            torch.cuda.synchronize()
            taken.append(began.elapsed_time(ended))
            model.zero_grad()
        step_ms[policy] = statistics.median(taken[2:])
        copying_ms = sum(copier.copying_ms() for copier in model.copiers)
        del model
    added_ms = step_ms["full on the host"] - step_ms["full on the device"]
    print(f"{step_ms}, copies {copying_ms:.2f} ms, hidden {1 - added_ms / copying_ms:.0%}")
    assert copying_ms > 0
    assert added_ms < 0.5 * copying_ms, "most of the copies' time is hidden"
