"""What one step of each optimizer computes, rounding by rounding. Numbers only: no tensors.

[Note: recipe] Every implementation (compiled, Triton, torch operations) does what is written here and nothing else, so
their results are equal bit by bit. The formulas are those of torch.optim, and of `zerolith.optim.Lion`.

Once per step, on the host: the right-hand sides under "numbers" are computed in fp64, from the arguments as given, and
each is rounded to fp32 once. `w'` is w if w < 0.5 and else w - 1, which is exact in fp32.

Per element: each sign + - * / and sqrt below is one IEEE 754 operation in fp32 that rounds to nearest even; none are
fused, none reordered. Products of three are taken from the left. Subnormal numbers count. `f` is the gradient factor.

    lerp(a, b, w)   = (a if w < 0.5 else b) + (b - a) * w'         as torch.lerp, from the nearer end
    always          g = fp32(gradient) * f                         bf16 and fp16 are widened exactly

    AdamW           p = p * decay                                  numbers: decay = 1 - lr weight_decay
                    (the rest as Adam)
    Adam            if weight_decay: g = g + p * weight_decay      first_gain = 1 - beta1
                    m = lerp(m, g, first_gain)                     second_keep = beta2, second_gain = 1 - beta2
                    v = v * second_keep + g * second_gain * g      rate = lr sqrt(1 - beta2^t) / (1 - beta1^t)
                    p = p - m * rate / (sqrt(v) + eps)             eps = eps sqrt(1 - beta2^t)
    Lion            u = sign(m * first_keep + g * first_gain)      first_keep = beta1, first_gain = 1 - beta1
                    p = p * decay - u * rate                       decay = 1 - lr weight_decay, rate = lr
                    m = lerp(m, g, second_gain)                    second_gain = 1 - beta2; sign(NaN) = 0
    Adagrad         if weight_decay: g = g + p * weight_decay
                    s = s + g * g
                    p = p - g * rate / (sqrt(s) + eps)             rate = lr / (1 + (t - 1) lr_decay)
    SGD             if weight_decay: g = g + p * weight_decay
                    if momentum, first step: m = g
                    if momentum, later: m = m * first_keep         first_keep = momentum
                                          + g * first_gain         first_gain = 1 - dampening
                    if nesterov: g = g + m * first_keep, else if momentum: g = m
                    p = p - g * rate                               rate = lr

The bias corrections of Adam stand in `rate` and `eps` (Kingma and Ba, section 2), which saves an operation per element;
before rounding it is torch's own formula.

New weights in bf16 or fp16 are the new fp32 weight rounded to nearest even; fp16 overflows to infinity. A NaN is a NaN
everywhere, but its sign and payload are whatever the processor makes of it.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, fields
from enum import IntEnum

from zerolith.errors import UsageError


class Kind(IntEnum):
    """Which formula; the numbers are those of csrc/tier.h."""

    ADAMW = 0
    ADAM_L2 = 1
    LION = 2
    ADAGRAD = 3
    SGD = 4
    MOMENTUM = 5


NUM_STATES = {Kind.ADAMW: 2, Kind.ADAM_L2: 2, Kind.LION: 1, Kind.ADAGRAD: 1, Kind.SGD: 0, Kind.MOMENTUM: 1}


def fp32(value: float) -> float:
    """`value` rounded to fp32."""
    return ctypes.c_float(value).value


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The numbers of one step. See [Note: recipe]."""

    kind: Kind
    grad_factor: float = 1.0
    weight_decay: float = 0.0  # in the gradient; 0 where the weight decays apart from it
    decay: float = 1.0
    first_keep: float = 0.0
    first_gain: float = 0.0
    second_keep: float = 0.0
    second_gain: float = 0.0
    eps: float = 0.0
    rate: float = 0.0
    is_first: bool = False
    is_nesterov: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                object.__setattr__(self, field.name, fp32(value))


def toward(gain: float) -> float:
    """The factor of lerp(): `gain`, or less 1 from the other end. Exact."""
    return gain if gain < 0.5 else gain - 1.0


def adam_recipe(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_factor: float,
    decoupled: bool,
) -> Recipe:
    """Step number `step`, counted from 1."""
    _check(lr=lr, eps=eps, weight_decay=weight_decay, betas=betas, step=step)
    first, second = betas
    root = math.sqrt(1 - second**step)
    couples = weight_decay != 0 and not decoupled
    return Recipe(
        kind=Kind.ADAM_L2 if couples else Kind.ADAMW,
        grad_factor=float(grad_factor),
        weight_decay=float(weight_decay) if couples else 0.0,
        decay=1.0 - lr * weight_decay if decoupled else 1.0,
        first_gain=1.0 - first,
        second_keep=float(second),
        second_gain=1.0 - second,
        eps=eps * root,
        rate=lr * root / (1 - first**step),
    )


def lion_recipe(*, lr: float, betas: tuple[float, float], weight_decay: float, grad_factor: float) -> Recipe:
    """Any step."""
    _check(lr=lr, weight_decay=weight_decay, betas=betas)
    return Recipe(
        kind=Kind.LION,
        grad_factor=float(grad_factor),
        decay=1.0 - lr * weight_decay,
        first_keep=float(betas[0]),
        first_gain=1.0 - betas[0],
        second_gain=1.0 - betas[1],
        rate=float(lr),
    )


def adagrad_recipe(
    *, lr: float, lr_decay: float, weight_decay: float, eps: float, step: int, grad_factor: float
) -> Recipe:
    """Step number `step`, counted from 1."""
    _check(lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay, step=step)
    return Recipe(
        kind=Kind.ADAGRAD,
        grad_factor=float(grad_factor),
        weight_decay=float(weight_decay),
        eps=float(eps),
        rate=lr / (1.0 + (step - 1) * lr_decay),
    )


def sgd_recipe(
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
    grad_factor: float,
) -> Recipe:
    """Step number `step`, counted from 1."""
    _check(lr=lr, momentum=momentum, weight_decay=weight_decay, step=step)
    if nesterov and (momentum == 0 or dampening != 0):
        raise UsageError(f"nesterov needs a momentum and no dampening, not momentum {momentum}, dampening {dampening}")
    return Recipe(
        kind=Kind.MOMENTUM if momentum else Kind.SGD,
        grad_factor=float(grad_factor),
        weight_decay=float(weight_decay),
        first_keep=float(momentum),
        first_gain=1.0 - dampening,
        rate=float(lr),
        is_first=step == 1,
        is_nesterov=nesterov,
    )


def _check(*, step: int = 1, betas: tuple[float, float] = (0.0, 0.0), **not_negative: float) -> None:
    if step < 1:
        raise UsageError(f"step {step}: steps count from 1")
    if not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas {betas} must lie in [0, 1)")
    for name, value in not_negative.items():
        if not value >= 0:
            raise UsageError(f"{name} {value} must not be negative")
