"""bf16 and fp16 training has the bits of a plain program that is spelled out here."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from plain import (
    MICRO,
    STAGES,
    Batch,
    Habit,
    Trained,
    assert_same_bits,
    config_for,
    loss_of,
    make_batches,
    make_mlp,
    start,
    step_each,
    train_engine,
)

BLOCK = 256
CLIP = 0.4  # less than the norms that come up, so that it always has an effect
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Mixed(NamedTuple):
    """Dtypes of the plain program."""

    compute: torch.dtype = FP32
    wire: torch.dtype = FP32  # each micro-batch's gradient is rounded to it
    accumulate: torch.dtype = FP32
    autocast: torch.dtype | None = None


def train_mixed(batches: list[Batch], mixed: Mixed, *, clip: float = 0.0, scales: list[float] | None = None) -> Trained:
    """A half-precision copy of the model, fp32 masters, and micro-batch gradients summed up in order.

    The sum is scaled once: by the mean over micro-batches, the loss scale and the clip coefficient together.
    """
    model = make_mlp()
    # Padded to whole blocks: the vector unit and the loop over what is left differ in their last bits.
    masters = [padded(param.detach()) for param in model.parameters()]
    model.to(mixed.compute)
    optimizer = torch.optim.AdamW(masters, lr=0.01, weight_decay=0.0, fused=True)
    norms = []
    for batch, scale in zip(batches, scales or [1.0] * len(batches), strict=True):
        sums: list[Tensor] = []
        for micro in micro_batches(batch):
            grads = micro_gradients(model, micro, mixed, scale)
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
        terms = len(batch.x) // MICRO * scale
        norms.append(block_norm(sums) / terms)
        coefficient = min(1.0, clip / (norms[-1] + 1e-6)) if clip else 1.0
        for master, total in zip(masters, sums, strict=True):
            master.grad = padded(total.mul_(coefficient / terms).float())
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters, strict=True):
                param.copy_(unpadded(master, param))
    weights = {
        name: unpadded(master, param) for (name, param), master in zip(model.named_parameters(), masters, strict=True)
    }
    return Trained(weights, norms, [True] * len(batches))


def padded(tensor: Tensor) -> Tensor:
    flat = tensor.new_zeros(-(-tensor.numel() // BLOCK) * BLOCK)
    flat[: tensor.numel()] = tensor.flatten()
    return flat


def unpadded(flat: Tensor, like: Tensor) -> Tensor:
    return flat[: like.numel()].view_as(like).clone()


def micro_batches(batch: Batch) -> Iterator[Batch]:
    for pair in zip(batch.x.split(MICRO), batch.y.split(MICRO), strict=True):
        yield Batch(*pair)


def micro_gradients(model: nn.Module, micro: Batch, mixed: Mixed, scale: float) -> list[Tensor]:
    """One micro-batch's gradients, as they travel and in the dtype in which they are added."""
    with torch.autocast("cpu", dtype=mixed.autocast or BF16, enabled=mixed.autocast is not None):
        loss = loss_of(model, Batch(micro.x.to(mixed.compute), micro.y))
    return [
        grad.to(mixed.wire).to(mixed.accumulate) for grad in torch.autograd.grad(loss * scale, list(model.parameters()))
    ]


def block_norm(tensors: list[Tensor]) -> float:
    """The 2-norm, with squares summed up in blocks of 256 elements, in 16 lanes of fp64, and then exactly."""
    squares: list[float] = []
    for tensor in tensors:
        lanes = padded(tensor.double()).square().view(-1, BLOCK // 16, 16)
        total = functools.reduce(torch.add, lanes.unbind(1))
        for width in (8, 4, 2, 1):
            total = total[:, :width] + total[:, width:]
        squares += total.flatten().tolist()
    return math.sqrt(math.fsum(squares))


def masters_of(engine: Any) -> dict[str, Tensor]:
    """This rank's masters, whole at one rank or stage 0: as fp32 tensors by name."""
    found = {}
    for own in engine._partitioned.gradients:
        for index, member in enumerate(own.section.members):
            whole = torch.empty(member.param.numel())
            for param, held, part in engine._partitioned.locate(own, index):
                whole[part.start : part.stop] = param.detach().view(-1)[held.start : held.stop]
            found[member.name] = whole.view(member.param.shape)
    return found


def dtype_config(mixed: Mixed) -> dict[str, Any]:
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    config: dict[str, Any] = {"communication_data_type": names[mixed.wire]}
    config["data_types"] = {"grad_accum_dtype": names[mixed.accumulate]}
    if mixed.autocast is not None:
        config["torch_autocast"] = {"enabled": True, "dtype": str(mixed.autocast).removeprefix("torch.")}
    if mixed.compute == BF16:
        config["bf16"] = {"enabled": True}
    if mixed.compute == FP16:
        config["fp16"] = {"enabled": True, "loss_scale": 64.0}
    return config


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0, fused=True)


class InComputeDtype(nn.Module):
    """Casts its input as a client would."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = make_mlp(), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype))


def train_like(
    mixed: Mixed, batches: list[Batch], stage: int, *, habit: Habit = step_each, **overrides: Any
) -> Trained:
    config = config_for(stage, **(dtype_config(mixed) | overrides))
    engine = start(config, model=InComputeDtype(mixed.compute), make_optimizer=adamw)
    trained = train_engine(engine, batches, habit)
    weights = {name.removeprefix("body."): weight for name, weight in trained.weights.items()}
    return trained._replace(weights=weights)


def cast(trained: Trained, dtype: torch.dtype) -> Trained:
    return trained._replace(weights={name: weight.to(dtype) for name, weight in trained.weights.items()})


ROWS = {
    "bf16": Mixed(BF16, BF16),
    "fp16": Mixed(FP16, FP16),
    "bf16 sent in fp32": Mixed(BF16, FP32),
    "bf16 added up in bf16": Mixed(BF16, BF16, BF16),
    "fp32 sent in bf16": Mixed(FP32, BF16),
    "fp32 sent in fp16": Mixed(FP32, FP16),
    "autocast to bf16": Mixed(autocast=BF16),
    "fp32": Mixed(),
}
EVERY_ROW = pytest.mark.parametrize("mixed", list(ROWS.values()), ids=list(ROWS))


@EVERY_ROW
def test_every_stage_has_the_bits_of_the_plain_program(mixed: Mixed) -> None:
    scales = [64.0 if mixed.compute == FP16 else 1.0] * 3

    def body() -> None:
        for gas, clip in ((1, 0.0), (2, CLIP)):
            batches = make_batches(3, gas * 2 * MICRO)
            expected = cast(train_mixed(batches, mixed, clip=clip, scales=scales), mixed.compute)
            assert not clip or max(expected.norms) > CLIP
            for stage in STAGES:
                options = {"gas": gas, "gradient_clipping": clip, "reproducible": gas > 1}
                assert_same_bits(train_like(mixed, batches, stage, **options), expected)

    run_ranks(2, body)


@EVERY_ROW
def test_one_rank_has_the_bits_of_the_plain_program(mixed: Mixed) -> None:
    batches = make_batches(3, 3 * MICRO)
    scales = [64.0 if mixed.compute == FP16 else 1.0] * 3
    expected = cast(train_mixed(batches, mixed, clip=CLIP, scales=scales), mixed.compute)
    for stage in STAGES:
        for reproducible in (True, False):
            if not reproducible and stage < 2 and mixed.wire != mixed.accumulate:
                continue  # added up before it is sent, so rounded to the wire's dtype once rather than each time
            options = {"gas": 3, "gradient_clipping": CLIP, "reproducible": reproducible}
            assert_same_bits(train_like(mixed, batches, stage, **options), expected)


@pytest.mark.parametrize("mixed", [ROWS["bf16"], ROWS["fp16"]], ids=["bf16", "fp16"])
def test_masters_are_fp32_and_keep_what_the_weights_cannot(mixed: Mixed) -> None:
    batches = make_batches(3, MICRO)
    expected = train_mixed(batches, mixed, scales=[64.0 if mixed.compute == FP16 else 1.0] * 3)
    for stage in STAGES:
        engine = start(
            config_for(stage, **dtype_config(mixed)), model=InComputeDtype(mixed.compute), make_optimizer=adamw
        )
        masters: dict[str, Tensor] = {}

        def look(engine: Any, optimizer: Any, micro: list[Batch], masters=masters) -> None:
            engine.backward(loss_of(engine, micro[0]))
            engine.step()
            masters.update(masters_of(engine))

        train_engine(engine, batches, look)
        for name, master in expected.weights.items():
            assert torch.equal(masters[f"body.{name}"], master), name
            assert not torch.equal(master, master.to(mixed.compute).float())


def test_fp16_gradients_too_small_for_fp16_survive_by_the_loss_scale() -> None:
    """Without a scale they are zero, and no weight moves."""
    batches = [batch._replace(y=batch.y * 1e-4, x=batch.x * 1e-4) for batch in make_batches(2, MICRO)]
    weights = {}
    for scale in (1.0, 2.0**15):
        config = config_for(1, fp16={"enabled": True, "loss_scale": scale})
        engine = start(config, model=InComputeDtype(FP16), make_optimizer=adamw)
        weights[scale] = train_engine(engine, batches).weights["body.0.weight"]
    initial = make_mlp()[0].weight.half()
    assert (weights[1.0] != initial).float().mean() < (weights[2.0**15] != initial).float().mean()


def test_a_growth_step_is_unscaled_with_the_scale_of_its_backward() -> None:
    batches = make_batches(5, MICRO)
    scales = [16.0, 16.0, 32.0, 32.0, 64.0]
    expected = cast(train_mixed(batches, ROWS["fp16"], scales=scales), FP16)
    for stage in STAGES:
        seen = []

        def note(engine: Any, optimizer: Any, micro: list[Batch], seen: list[float] = seen) -> None:
            seen.append(engine.loss_scale())
            engine.scale(loss_of(engine, micro[0])).backward()
            engine.step()
            assert optimizer.cur_scale == engine.loss_scale()

        fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}
        assert_same_bits(train_like(ROWS["fp16"], batches, stage, habit=note, fp16=fp16), expected)
        assert seen == scales


def test_auto_cast_casts_floating_point_inputs_in_any_argument() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_mlp()

        def forward(self, batch: dict[str, Tensor], *, bias: Tensor) -> Tensor:
            assert batch["x"].dtype == bias.dtype == FP16
            assert batch["ids"].dtype == torch.int64
            return self.body(batch["x"]) + bias

    engine = start(config_for(0, fp16={"enabled": True, "auto_cast": True}), model=Model(), make_optimizer=adamw)
    out = engine({"x": torch.randn(2, 6), "ids": torch.arange(2)}, bias=torch.ones(3))
    assert out.dtype == FP16
    engine.destroy()
