"""engine.compile compiles blocks, and stages stay bitwise equal under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zerolith
from harness import run_ranks
from models import make_gpt, start_engine, token_batches, zero_config
from zerolith.errors import UsageError

DATA = token_batches(3, 8)


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def losses(stage: int, *, compiled: bool, checkpointed: bool = False) -> tuple[list[float], int]:
    torch._dynamo.reset()
    policy = {"activation_checkpointing": {"policy": "full"}} if checkpointed else {}
    engine = start_engine(make_gpt(), zero_config(stage, **policy))
    backend = Counted()
    if compiled:
        engine.compile(backend=backend)
        engine.compile(backend=backend)  # once is enough
        assert engine.is_compiled
    found = []
    for batch in DATA:
        loss = engine(batch.chunk(engine.world_size)[engine.global_rank])
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    blocks = engine._sharded.blocks
    engine.destroy()
    assert not any("forward" in vars(block) for block in blocks)
    return found, backend.graphs


@pytest.mark.parametrize("checkpointed", [False, True])
def test_stages_are_bitwise_equal_to_each_other_and_to_the_uncompiled(checkpointed: bool) -> None:
    def body() -> None:
        plain, none = losses(0, compiled=False)
        assert none == 0
        for stage in (0, 1, 2, 3):
            found, graphs = losses(stage, compiled=True, checkpointed=checkpointed)
            assert found == plain, stage
            assert graphs > 0

    run_ranks(2, body, timeout_s=240)


def compiled_whole() -> None:
    backend = Counted()
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = zerolith.initialize(model=nn.Linear(4, 4), config=config)[0]
    assert not engine.is_compiled
    engine.compile(backend=backend, compile_kwargs={"dynamic": False})
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    assert backend.graphs == 1
    engine.destroy()
    with pytest.raises(UsageError, match="destroyed"):
        engine.compile()


def test_a_model_without_blocks_is_compiled_whole() -> None:
    run_ranks(1, compiled_whole)  # not here: the compiler leaves much behind in a process
