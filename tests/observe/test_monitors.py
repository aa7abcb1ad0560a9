"""What is written for people to watch is what happened."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import start_engine, zero_config
from zerolith.errors import ConfigError, ZerolithError

SGD = {"type": "SGD", "params": {"lr": 0.5}}
HALVED = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).square().mean()


def train(folder: str, section: str, gas: int = 2, steps: int = 3) -> tuple[list[float], list[float]]:
    """Losses of this rank's micro-batches and norms of the steps."""
    torch.manual_seed(0)
    place = {"project": "p", "group": "g"} if section == "wandb" else {"output_path": folder, "job_name": "job"}
    written = {section: {"enabled": True, **place}}
    config = zero_config(2, gradient_accumulation_steps=gas, optimizer=SGD, scheduler=HALVED, **written)
    engine = start_engine(Tokens(), config)
    losses, norms = [], []
    for step in range(steps):
        for micro in range(gas):
            tokens = torch.full((4, 3), (step * gas + micro + engine.global_rank) % 8)
            loss = engine(tokens)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step()
        norms.append(engine.get_global_grad_norm())
    engine.destroy()
    return losses, norms


def read_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for path in folder.glob("*.csv"):
        with path.open() as file:
            head, *rows = list(csv.reader(file))
        assert head == ["step", path.stem]
        found[path.stem.removeprefix("Train_Samples_")] = [(int(at), float(value)) for at, value in rows]
    return found


def check(found: dict[str, list[tuple[int, float]]], results: list[tuple[list[float], list[float]]]) -> None:
    samples = [16, 32, 48]
    assert all([at for at, _ in rows] == samples for rows in found.values())
    values = {name: [value for _, value in rows] for name, rows in found.items()}
    (first, norms), (second, _) = results
    means = [sum(first[step : step + 2] + second[step : step + 2]) / 4 for step in (0, 2, 4)]
    assert values["train_loss"] == pytest.approx(means, rel=1e-5)
    assert values["lr"] == pytest.approx([0.5, 0.25, 0.125])
    assert values["grad_norm"] == pytest.approx(norms, rel=1e-5)
    assert values["loss_scale"] == [1.0] * 3
    assert values["skipped_steps"] == [0.0] * 3
    assert all(value > 50 for value in values["memory_mb"])
    ratios = [a / b for a, b in zip(values["tokens_per_second"], values["samples_per_second"], strict=True)]
    assert ratios == pytest.approx([3.0] * 3, rel=1e-5)


def test_csv_files_hold_every_step(tmp_path: Path) -> None:
    results = run_ranks(2, train, str(tmp_path), "csv_monitor")
    check(read_csv(tmp_path / "job"), results)
    run_ranks(2, train, str(tmp_path), "csv_monitor", 1, 1)
    assert len(read_csv(tmp_path / "job")["lr"]) == 4, "a later run goes on in the same files"


def test_tensorboard_events_hold_every_step(tmp_path: Path) -> None:
    results = run_ranks(2, train, str(tmp_path), "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "job"))
    events.Reload()
    found = {
        name.removeprefix("Train/Samples/"): [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    check(found, results)


def wandb_stand_in(seen: list[Any], run: Any = None) -> Any:
    """A module that notes what is asked of it; run: what is under way already."""

    def init(**options: Any) -> Any:
        seen.append(options)
        return types.SimpleNamespace(
            id="ours",
            define_metric=lambda name, step_metric: seen.append((name, step_metric)),
            log=lambda numbers: seen.append(numbers),
            finish=lambda: seen.append("finished"),
        )

    return types.SimpleNamespace(init=init, Error=OSError, run=run)


def test_wandb_gets_every_step_on_one_rank() -> None:
    def body(run: Any) -> list[Any]:
        seen: list[Any] = []
        sys.modules["wandb"] = wandb_stand_in(seen, run)
        torch.manual_seed(0)
        section = {"enabled": True, "project": "p", "group": "g", "team": "t"}
        engine = start_engine(Tokens(), zero_config(1, optimizer=SGD, wandb=section))
        engine.backward(engine(torch.ones(4, 3, dtype=torch.long)))
        engine.step()
        engine.destroy()
        return seen

    first, second = run_ranks(2, body, None)
    assert second == []
    assert first[0] == {"project": "p", "group": "g", "entity": "t"}
    assert first[1] == ("Train/Samples/*", "samples")
    assert first[2]["samples"] == 8
    assert "Train/Samples/train_loss" in first[2]
    assert first[3:] == ["finished"]
    theirs = run_ranks(1, body, types.SimpleNamespace(id="theirs"))[0]
    assert theirs[0] == first[0]
    assert "finished" not in theirs, "the application's own run goes on"


def test_wandb_that_starts_no_run_is_said_on_every_rank() -> None:
    def body() -> str:
        sys.modules["wandb"] = fake = wandb_stand_in([])

        def init(**_: Any) -> None:
            raise fake.Error("No API key")

        fake.init = init
        with pytest.raises(ZerolithError) as caught:
            start_engine(Tokens(), zero_config(1, optimizer=SGD, wandb={"enabled": True}))
        return str(caught.value)

    first, second = run_ranks(2, body)
    assert first.startswith("wandb.enabled: no run can be started (No API key)")
    assert first in second


def test_a_folder_of_past_runs_is_not_taken_for_wandb() -> None:
    def body() -> str:
        sys.modules["wandb"] = types.ModuleType("wandb")  # what importing ./wandb gives
        with pytest.raises(ConfigError) as caught:
            start_engine(Tokens(), zero_config(0, optimizer=SGD, wandb={"enabled": True}))
        return str(caught.value)

    assert run_ranks(1, body) == ["wandb.enabled: wandb is not installed; pip install wandb"]


def wandb_records(path: Path) -> list[Any]:
    """What an offline run wrote: 7 bytes of head, then a log in LevelDB's format, of blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # too few for the head of a piece: checksum, length, kind
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def read_wandb(path: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, by the names of their numbers."""
    rows = [record.history.item for record in wandb_records(path) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the real wandb, if there is one, writes the runs of this test."""
    pytest.importorskip("wandb", minversion="0.19.10")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "wandb"


def test_an_offline_run_of_wandb_holds_every_step(offline: Path) -> None:
    results = run_ranks(2, train, "", "wandb")
    (path,) = offline.glob("offline-run-*/run-*.wandb")
    rows = read_wandb(path)
    names = {name for name in rows[0] if name.startswith("Train/Samples/")}
    check(
        {name.removeprefix("Train/Samples/"): [(row["samples"], row[name]) for row in rows] for name in names}, results
    )
    records = {record.WhichOneof("record_type"): record for record in wandb_records(path)}
    assert (records["run"].run.project, records["run"].run.run_group) == ("p", "g")
    assert (records["metric"].metric.glob_name, records["metric"].metric.step_metric) == ("Train/Samples/*", "samples")
    assert records["exit"].exit.exit_code == 0, "destroy() ends it"


def test_wandb_runs_of_the_application_and_of_other_engines_stay_whole(offline: Path) -> None:
    def start() -> Any:
        return start_engine(Tokens(), zero_config(0, optimizer=SGD, wandb={"enabled": True}))

    def step(engine: Any) -> None:
        engine.backward(engine(torch.ones(4, 3, dtype=torch.long)))
        engine.step()

    def body() -> str:
        import wandb

        own = wandb.init(project="own")
        engine = start()
        for number in range(1, 4):
            step(engine)
            own.log({"theirs": number}, step=number)
        engine.destroy()
        own.log({"later": 1})
        own.finish()
        first, second = start(), start()
        step(first)
        first.destroy()
        step(second)
        step(second)
        second.destroy()
        return own.id

    own = run_ranks(1, body)[0]
    runs = {path.stem: read_wandb(path) for path in offline.glob("offline-run-*/run-*.wandb")}
    shared = runs.pop(f"run-{own}")
    assert [row["theirs"] for row in shared if "theirs" in row] == [1, 2, 3]
    assert [row["samples"] for row in shared if "Train/Samples/lr" in row] == [4, 8, 12]
    assert shared[-1]["later"] == 1
    assert sorted(len(rows) for rows in runs.values()) == [1, 2], "engines side by side have a run each"


@pytest.mark.parametrize(
    ("section", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("csv_monitor", None)]
)
def test_what_cannot_be_written_is_said_on_every_rank(tmp_path: Path, section: str, module: str | None) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")

    def body() -> str:
        if module is not None:
            for name in [name for name in sys.modules if name.split(".")[0] == module or "tensorboard" in name]:
                sys.modules.pop(name)
            sys.modules[module] = None  # type: ignore[assignment]
        options = {"enabled": True} if section == "wandb" else {"enabled": True, "output_path": str(blocked)}
        if section == "tensorboard":
            options["output_path"] = str(tmp_path / "fine")
        with pytest.raises(ZerolithError) as caught:
            start_engine(Tokens(), zero_config(1, optimizer=SGD, **{section: options}))
        return str(caught.value)

    for message in run_ranks(2, body):
        assert section in message


def test_without_monitors_a_step_sends_nothing_more() -> None:
    def body() -> tuple[int, int]:
        counts = []
        for enabled in (False, True):
            section = {"enabled": enabled, "output_path": "/tmp", "job_name": "zerolith-test-job"}
            engine = start_engine(Tokens(), zero_config(1, optimizer=SGD, csv_monitor=section))
            calls: list[str] = []
            original = engine._sharded.comm.sum
            engine._sharded.comm.sum = lambda *a, _f=original, _c=calls, **k: _c.append(k["name"]) or _f(*a, **k)
            engine._watch._comm = engine._sharded.comm
            engine.backward(engine(torch.ones(4, 3, dtype=torch.long)))
            engine.step()
            counts.append(calls.count("monitors"))
            engine.destroy()
        return counts[0], counts[1]

    assert run_ranks(2, body) == [(0, 1)] * 2


def test_a_plain_backward_leaves_the_loss_out(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = zerolith.initialize(model=Tokens(), config=zero_config(0, optimizer=SGD, csv_monitor=section))[0]
    engine(torch.ones(4, 3, dtype=torch.long)).backward()
    engine.step()
    engine.destroy()
    names = set(read_csv(tmp_path / "job"))
    assert "train_loss" not in names
    assert {"lr", "grad_norm", "memory_mb"} <= names
    assert json.dumps(sorted(names))


def test_a_record_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    def body() -> list[float]:
        torch.manual_seed(0)
        place = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
        engine = start_engine(Tokens(), zero_config(2, optimizer=SGD, csv_monitor=place))
        if engine.global_rank == 0:
            shutil.rmtree(tmp_path)
        norms = []
        for step in range(3):
            engine.backward(engine(torch.full((4, 3), step)))
            engine.step()
            norms.append(engine.get_global_grad_norm())
        engine.destroy()
        return norms

    first, second = run_ranks(2, body)
    assert first == second
