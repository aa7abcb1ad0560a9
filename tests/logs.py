"""Engines whose log is looked at, and what they wrote."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from models import start_engine, zero_config

SGD = {"type": "SGD", "params": {"lr": 0.5}}
HALVED = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
LOGGER = logging.getLogger("zerolith")


def config_of(form: str | None, every: int | None = 2, **more: Any) -> dict[str, Any]:
    form_keys = {} if form is None else {"zerolith": {"log_format": form}}
    return zero_config(1, steps_per_print=every, optimizer=SGD, **form_keys, **more)


def make_engine(form: str | None, **more: Any) -> Any:  # an Engine; typed Any since tests also look inside
    torch.manual_seed(0)
    return start_engine(nn.Linear(4, 2), config_of(form, **more))


def step(engine: Any, factor: float = 1.0) -> float:
    """One optimizer step; returns this rank's loss."""
    x = torch.full((4, 4), factor * (1.0 + engine.global_rank + engine.global_steps))
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


@contextlib.contextmanager
def stderr() -> Iterator[io.StringIO]:
    os.environ.pop("FORCE_COLOR", None)
    os.environ.pop("TTY_COMPATIBLE", None)
    with contextlib.redirect_stderr(io.StringIO()) as text:
        yield text


def parsed(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps_in(text: str) -> list[dict[str, Any]]:
    return [record for record in parsed(text) if "step" in record]


def train(form: str | None, factors: list[float], more: dict[str, Any]) -> tuple[str, list[float], list[float]]:
    """What this rank wrote to stderr, its losses and the norms."""
    with stderr() as text:
        engine = make_engine(form, scheduler=HALVED, **more)
        losses, norms = [], []
        for factor in factors:
            losses.append(step(engine, factor))
            norms.append(engine.get_global_grad_norm())
        engine.destroy()
    return text.getvalue(), losses, norms
