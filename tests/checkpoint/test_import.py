"""An engine goes on from what DeepSpeed saved as plain PyTorch would; what cannot be taken is refused or said."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import error_between, make_gpt, my_pieces, sgd, start_engine, token_batches, whole_weights, zero_config
from zerolith.checkpoint import Reader
from zerolith.checkpoint.deepspeed import DeepSpeedCheckpoint, ForeignParameter, ParamGroup
from zerolith.checkpoint.folder import Lock
from zerolith.checkpoint.importing import write_imported
from zerolith.checkpoint.verify import damages
from zerolith.errors import CheckpointError, CheckpointLockedError

BATCH, STEPS, MORE = 8, 2, 3


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    flat, deep = [p for p in model.parameters() if p.dim() < 2], [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": flat, "weight_decay": 0.0, "lr": 0.05}, {"params": deep, "weight_decay": 0.1}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def as_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, home: Path, **more: Any) -> DeepSpeedCheckpoint:
    """What would have been read of a checkpoint of this plain run."""
    parameters = {}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        parameters[name] = ForeignParameter(
            shape=tuple(param.shape),
            dtype=param.dtype,
            trained=param.requires_grad,
            value=later(param),
            state={key: later(value) for key, value in state.items() if value.dim()},
            scalars={key: float(value) for key, value in state.items() if not value.dim()},
        )
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [
        ParamGroup(
            {key: value for key, value in group.items() if key != "params"} | {"bias_correction": True, "step": 7},
            tuple(names[id(param)] for param in group["params"]),
        )
        for group in optimizer.param_groups
    ]
    facts: dict[str, Any] = {
        "home": home,
        "files": (),
        "step": STEPS,
        "samples": STEPS * BATCH,
        "skipped_steps": 0,
        "zero_stage": 2,
        "num_ranks": 4,
        "parameters": parameters,
        "buffers": {},
        "aliases": {"head.weight": "embed.weight"},
        "param_groups": groups,
        "scheduler": None,
        "loss_scale": None,
        "client_state": {},
    }
    return DeepSpeedCheckpoint(**facts | more)


def later(tensor: Tensor) -> Callable[[], Tensor]:
    held = tensor.detach().clone()
    return lambda: held.clone()


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> list[float]:
    losses = []
    for batch in data:
        loss = model(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("make_optimizer", [adamw, sgd, two_groups])
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_training_goes_on_as_it_would_have(stage: int, world: int, make_optimizer: Any, tmp_path: Path) -> None:
    data = token_batches(STEPS + MORE, BATCH)
    model = make_gpt()
    optimizer = make_optimizer(model)
    plain_steps(model, optimizer, data[:STEPS])
    write_imported(as_deepspeed(model, optimizer, tmp_path / "theirs" / "tag"), tmp_path / "job", "tag")
    expected = plain_steps(model, optimizer, data[STEPS:])

    def body() -> tuple[list[float], dict[str, Tensor], dict[str, Any], int, int]:
        config = zero_config(stage, train_micro_batch_size_per_gpu=BATCH // world)
        engine = start_engine(make_gpt(seed=5), config, make_optimizer)
        home, client = engine.load_checkpoint(tmp_path / "job")
        assert home == str(tmp_path / "job" / "tag")
        assert client == {}
        losses = []
        for batch in data[STEPS:]:
            for piece in my_pieces(batch, engine):
                loss = engine(piece)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        options = {key: value for key, value in engine.basic_optimizer.param_groups[0].items() if key != "params"}
        return losses, whole_weights(engine), options, engine.global_steps, engine.global_samples

    outcomes = run_ranks(world, body)
    losses = [sum(each) / world for each in zip(*(outcome[0] for outcome in outcomes), strict=True)]
    assert losses == pytest.approx(expected, rel=1e-5)
    if make_optimizer is not adamw:  # which turns the round-off in a gradient that is truly zero into a full step
        assert error_between(outcomes[0][1], {n: p.detach() for n, p in model.named_parameters()}) < 1e-5
    assert not outcomes[0][2].keys() & {"bias_correction", "step"}, "options of another class"
    assert outcomes[0][3:] == (STEPS + MORE, (STEPS + MORE) * BATCH)


def small(home: Path, **more: Any) -> DeepSpeedCheckpoint:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return as_deepspeed(model, optimizer, home, **{"aliases": {}} | more)


def load(folder: Path, **config: Any) -> Any:
    """What an engine of a linear layer says after loading."""
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}}} | config
    engine, _, _, scheduler = zerolith.initialize(model=nn.Linear(3, 2), config=config)
    _, client = engine.load_checkpoint(folder)
    rate, scale = engine.get_lr()[0], engine._scaler.scale
    return {"client": client, "rate": rate, "scale": scale, "last_epoch": getattr(scheduler, "last_epoch", None)}


def test_values_and_states_are_there_bit_for_bit_and_checked(tmp_path: Path) -> None:
    checkpoint = small(tmp_path / "theirs" / "tag", buffers={"seen": torch.tensor(3)})
    told: list[tuple[int, int]] = []
    home = write_imported(checkpoint, tmp_path / "job", "tag", tell=lambda done, total: told.append((done, total)))
    assert told[-1] == (64, 64)
    assert not list(damages(home))
    with Reader(home) as reader:
        for name, parameter in checkpoint.parameters.items():
            assert torch.equal(reader.tensor(f"value/{name}"), parameter.value())
            assert torch.equal(reader.tensor(f"optimizer/momentum_buffer/{name}"), parameter.state["momentum_buffer"]())
        assert reader.tensor("buffer/seen").item() == 3
    assert (tmp_path / "job" / "latest").read_text().startswith("tag\n")


def test_client_state_loss_scale_and_schedule_go_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = {"epoch": 2, "ema": torch.arange(3.0), "args": object(), 3: (1, 2)}
    scheduler = {"last_batch_iteration": 4}
    checkpoint = small(tmp_path / "t" / "tag", client_state=client, scheduler=scheduler, loss_scale=64.0)
    write_imported(checkpoint, tmp_path / "job", "tag")
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.3, "warmup_type": "linear"}}

    def body() -> Any:
        return load(tmp_path / "job", fp16={"enabled": True}, scheduler=schedule)

    said = run_ranks(1, body)[0]
    assert said["client"].pop("ema").tolist() == [0.0, 1.0, 2.0]
    assert said == {"client": {"epoch": 2, 3: (1, 2)}, "rate": 0.1, "scale": 64.0, "last_epoch": 5}
    assert "client_state['args'] is a builtins.object" in caplog.text
    assert run_ranks(1, lambda: load(tmp_path / "job"))[0]["scale"] == 1.0


def test_a_scale_of_one_is_none(tmp_path: Path) -> None:
    write_imported(small(tmp_path / "t" / "tag", loss_scale=1.0), tmp_path / "job", "tag")
    assert run_ranks(1, lambda: load(tmp_path / "job", fp16={"enabled": True}))[0]["scale"] == 2.0**16


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("AdamW", "has kept momentum_buffer, and .*AdamW needs exp_avg, exp_avg_sq; load with load_optimizer_states"),
        ("Lion", "has kept momentum_buffer, and .*Lion needs exp_avg"),
    ],
)
def test_states_of_another_optimizer_are_refused(kind: str, words: str, tmp_path: Path) -> None:
    write_imported(small(tmp_path / "t" / "tag"), tmp_path / "job", "tag")

    def body() -> None:
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "job", optimizer={"type": kind, "params": {"lr": 0.1}})

    run_ranks(1, body)


def test_without_an_optimizer_there_are_no_states_to_load(tmp_path: Path) -> None:
    write_imported(small(tmp_path / "t" / "tag", param_groups=[]), tmp_path / "job", "tag")

    def body() -> None:
        with pytest.raises(CheckpointError, match="has no optimizer states; load with load_optimizer_states=False"):
            load(tmp_path / "job")

    run_ranks(1, body)


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    checkpoint, job = small(tmp_path / "theirs" / "tag"), tmp_path / "job"
    write_imported(checkpoint, job, "tag")
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="it exists already"):
        write_imported(checkpoint, job, "tag")
    with pytest.raises(CheckpointError, match="a tag names a folder"):
        write_imported(checkpoint, job, "../tag")
    with pytest.raises(CheckpointError, match="DeepSpeed's checkpoints are here"):
        write_imported(checkpoint, tmp_path / "theirs", "new")
    lock = Lock(job)
    with pytest.raises(CheckpointLockedError, match="another job writes"):
        write_imported(checkpoint, job, "new")
    lock.release()
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file() and path.name[0] != "."} == {
        path: data for path, data in before.items() if path.name[0] != "."
    }


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, job = small(tmp_path / "theirs" / "tag"), tmp_path / "job"
    write_imported(checkpoint, job, "good")

    def broken() -> Tensor:
        raise CheckpointError("the file ends in it")

    for load_, words in [
        (broken, "the file ends in it"),
        (lambda: torch.zeros(2, dtype=torch.float64), r"float64 \(2,\); torch.float32 \(2,\) expected"),
        (lambda: torch.zeros(3), r"torch.float32 \(3,\)"),
    ]:
        bias = replace(checkpoint.parameters["bias"], value=load_)
        bad = replace(checkpoint, parameters=checkpoint.parameters | {"bias": bias})
        with pytest.raises(CheckpointError, match=words):
            write_imported(bad, job, "bad")
        assert sorted(path.name for path in job.iterdir()) == [".zerolith.lock", "good", "latest"]
    assert (job / "latest").read_text().startswith("good\n")


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    """16 tensors of 16 MiB take the memory of a few."""
    shape = (2**22,)
    parameters = {
        f"p{number}": ForeignParameter(
            shape=shape, dtype=torch.bfloat16, trained=True, value=lambda: torch.ones(shape, dtype=torch.bfloat16)
        )
        for number in range(16)
    }
    checkpoint = replace(small(tmp_path / "t" / "tag"), parameters=parameters)

    def body() -> int:
        write_imported(small(tmp_path / "t" / "tag"), tmp_path / "warm", "tag")  # libraries are in memory after this
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_imported(checkpoint, tmp_path / "job", "tag")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert run_ranks(1, body)[0] < 80 * 1024
