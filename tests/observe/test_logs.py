"""Rank 0 says the same in every form, once, and leaves the application's logging as it was."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zerolith
from harness import run_ranks
from logs import LOGGER, config_of, make_engine, parsed, stderr, step, steps_in, train
from models import start_engine
from zerolith.errors import ConfigError, ZerolithError
from zerolith.observe.json_lines import JsonFormatter

# --- JSON -------------------------------------------------------------------------------------------


def test_json_has_an_object_per_line_with_the_numbers_of_the_step() -> None:
    (text, losses, norms), (other, _, _) = run_ranks(2, train, "json", [1.0] * 4, {})
    assert other == ""
    records = parsed(text)
    for record in records:
        assert datetime.fromisoformat(record["time"]).utcoffset() is not None
        assert (record["level"], record["logger"]) == ("INFO", "zerolith")
    assert records[0]["message"].startswith("zerolith: 10 parameters")
    second, fourth = steps_in(text)
    assert (second["step"], fourth["step"]) == (2, 4)
    assert (second["samples"], fourth["samples"]) == (16, 32)
    assert (second["lr"], fourth["lr"]) == ([0.25], [0.0625]), "as the step used it"
    assert (second["grad_norm"], fourth["grad_norm"]) == (norms[1], norms[3])
    assert (second["loss"], fourth["loss"]) == (pytest.approx(losses[1]), pytest.approx(losses[3])), "of this rank"
    assert (second["loss_scale"], second["skipped_steps"]) == (1.0, 0)
    assert second["samples_per_second"] > 0
    assert second["message"] == f"step 2: loss {losses[1]:.4g}, lr 0.25, grad norm {norms[1]:.4g}, skipped 0"


def test_with_a_monitor_json_has_what_the_monitor_has(tmp_path: Path) -> None:
    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    (text, first, _), (_, second, _) = run_ranks(2, train, "json", [1.0, 1.0], section)
    (record,) = steps_in(text)
    assert record["loss"] == pytest.approx((first[1] + second[1]) / 2)
    assert record["memory_mb"] > 50
    for name, field in [("train_loss", record["loss"]), ("lr", record["lr"][0]), ("grad_norm", record["grad_norm"])]:
        last = (tmp_path / "job" / f"Train_Samples_{name}.csv").read_text().split()[-1]
        assert last == f"16,{field}"


def test_numbers_that_are_not_finite_are_null() -> None:
    text, _, norms = run_ranks(1, train, "json", [1.0, float("nan")], {})[0]
    (record,) = steps_in(text)
    assert norms[1] == float("inf")
    assert (record["loss"], record["grad_norm"], record["skipped_steps"]) == (None, None, 1)
    assert "loss nan" in record["message"]
    assert "grad norm inf" in record["message"]
    (warning,) = [record for record in parsed(text) if record["level"] == "WARNING"]
    assert "not finite" in warning["message"]


def test_json_takes_lists_exceptions_and_whatever_else_is_in_a_record() -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        record = logging.LogRecord("zerolith.sub", logging.ERROR, "", 1, "two\nlines %s", ("é",), sys.exc_info())
    record.numbers = {"lr": [1.0, float("-inf")], "path": Path("a")}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = parsed(line)[0]
    assert (found["logger"], found["message"], found["lr"], found["path"]) == (
        "zerolith.sub", "two\nlines é", [1.0, None], "a",
    )  # fmt: skip
    assert found["exception"].endswith("ValueError: odd")


def test_without_steps_per_print_json_has_no_steps_and_keeps_no_losses() -> None:
    def body() -> tuple[str, int]:
        with stderr() as text:
            engine = make_engine("json", every=None)
            step(engine)
            engine.backward(engine(torch.ones(4, 4)).sum())
            return text.getvalue(), len(engine._watch._losses)

    text, kept = run_ranks(1, body)[0]
    assert steps_in(text) == []
    assert kept == 0
    assert len(parsed(text)) == 1


def test_uneven_weights_do_not_bend_the_loss() -> None:
    def body() -> tuple[str, float]:
        with stderr() as text:
            engine = make_engine("json", every=1)
            losses = []
            for x in engine.join([torch.ones(4, 4)] * (2 if engine.global_rank == 0 else 1)):
                loss = engine(x).square().mean()
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            return text.getvalue(), losses[-1]

    text, last = run_ranks(2, body)[0]
    assert steps_in(text)[-1]["loss"] == pytest.approx(last)


def test_a_step_sends_as_much_as_without_a_log() -> None:
    def body() -> list[list[str]]:
        sent: list[list[str]] = []

        def noting(reduce: Callable[..., list[float]]) -> Callable[..., list[float]]:
            def call(values: list[float], op: Any, name: str) -> list[float]:
                sent[-1].append(name)
                return reduce(values, op, name)

            return call

        for form in ("plain", "json", "rich"):
            with stderr():
                engine = make_engine(form, every=1)
                sent.append([])
                engine._sharded.comm._all_reduce = noting(engine._sharded.comm._all_reduce)
                step(engine)
                sent[-1] += engine._sharded.comm.journal.latest()
                engine.destroy()
        return sent

    plain, as_json, by_rich = run_ranks(2, body)[0]
    assert "gradient norm" in plain
    assert plain == as_json == by_rich


# --- whose handlers there are -----------------------------------------------------------------------


class Client(logging.Handler):
    """An application's own."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.mark.parametrize("form", [None, "plain"])
def test_plain_installs_nothing_and_says_what_it_did(form: str | None) -> None:
    def body() -> tuple[list[Any], int, list[str], Any, str]:
        with stderr() as text:
            engine = make_engine(form)
            handlers, level = list(LOGGER.handlers), LOGGER.level
            client = Client()
            LOGGER.addHandler(client)
            LOGGER.setLevel(logging.INFO)
            step(engine), step(engine)
            norm = engine.get_global_grad_norm()
            engine.destroy()
        assert client.lines == [f"step 2: lr 0.5, grad norm {norm:.4g}, skipped 0"]
        return handlers, level, client.lines, client.records[0].__dict__["numbers"], text.getvalue()

    handlers, level, lines, numbers, text = run_ranks(1, body)[0]
    assert (handlers, level, text) == ([], logging.NOTSET, "")
    assert len(lines) == 1
    assert (numbers["step"], numbers["lr"]) == (2, [0.5])


@pytest.mark.parametrize("form", ["json", "rich"])
def test_two_engines_print_once_each_and_leave_nothing(form: str) -> None:
    def body() -> tuple[str, list[int]]:
        counts = []
        with stderr() as text:
            first, second = make_engine(form), make_engine(form)
            counts.append(len(LOGGER.handlers))
            for engine in (first, second) * 2:
                step(engine)
            first.destroy()
            counts.append(len(LOGGER.handlers))
            step(second), step(second)
            second.destroy()
            second.destroy()
            counts.append(len(LOGGER.handlers))
            LOGGER.warning("nobody prints this")
        assert LOGGER.level == logging.NOTSET
        return text.getvalue(), counts

    text, counts = run_ranks(1, body)[0]
    assert counts == [1, 1, 0]
    assert len(re.findall(r"zerolith: 10 parameters", text)) == 2
    assert len(re.findall(r"step 2: ", text)) == 2
    assert len(re.findall(r"step 4: ", text)) == 1
    assert "nobody" not in text


def test_the_form_is_that_of_the_latest_engine() -> None:
    def body() -> list[str]:
        seen = []
        with stderr():
            engines = [make_engine(form) for form in ("json", "rich", "plain")]
            for engine in [None, *reversed(engines)]:
                if engine is not None:
                    engine.destroy()
                seen.append(",".join(type(handler).__name__ for handler in LOGGER.handlers))
        return seen

    assert run_ranks(1, body)[0] == ["RichHandler", "RichHandler", "StreamHandler", ""]


def test_an_engine_that_is_dropped_takes_its_handler_along() -> None:
    def body() -> int:
        with stderr():
            make_engine("json")
            gc.collect()
        return len(LOGGER.handlers)

    assert run_ranks(1, body) == [0]


@pytest.mark.parametrize("form", ["json", "rich"])
def test_handlers_of_the_application_go_on(form: str) -> None:
    def body() -> tuple[list[str], list[str], str]:
        own, root = Client(), Client()
        LOGGER.addHandler(own)
        logging.getLogger().addHandler(root)
        with stderr() as text:
            engine = make_engine(form)
            step(engine), step(engine)
            engine.destroy()
        assert LOGGER.handlers == [own]
        return own.lines, root.lines, text.getvalue()

    own, root, text = run_ranks(1, body)[0]
    assert len(own) == 2
    assert own == root
    assert own[1].startswith("step 2: ")
    assert own[1] in text


def test_the_level_that_the_application_has_set_counts() -> None:
    def body() -> tuple[str, int]:
        LOGGER.setLevel(logging.WARNING)
        with stderr() as text:
            engine = make_engine("json")
            step(engine), step(engine)
            engine.destroy()
        return text.getvalue(), LOGGER.level

    assert run_ranks(1, body) == [("", logging.WARNING)]


def test_what_is_said_last_is_printed_too(tmp_path: Path) -> None:
    def body() -> str:
        trace = {"first_step": 1, "last_step": 9, "folder": str(tmp_path)}
        config = config_of("json", comms_logger={"enabled": True})
        config["zerolith"]["trace"] = trace
        with stderr() as text:
            engine = start_engine(nn.Linear(4, 2), config)
            step(engine)
            engine.destroy()
        return text.getvalue()

    messages = [record["message"] for record in parsed(run_ranks(1, body)[0])]
    assert messages[-2].startswith("operation")
    assert messages[-1].startswith("trace written to")


# --- what goes wrong --------------------------------------------------------------------------------


def test_rich_that_is_missing_is_said_on_every_rank() -> None:
    def body() -> tuple[str, str, list[Any], int]:
        if zerolith.comm.default_comm().rank == 0:  # it is rank 0 that needs it
            for name in [name for name in sys.modules if name.split(".")[0] == "rich" or name.endswith("observe.bar")]:
                sys.modules.pop(name)
            sys.modules["rich"] = None  # type: ignore[assignment]
        with pytest.raises(ZerolithError) as caught:
            make_engine("rich")
        return type(caught.value).__name__, str(caught.value), LOGGER.handlers, LOGGER.level

    (kind, message, *first), (_, other, *second) = run_ranks(2, body)
    assert kind == "ConfigError"
    assert message == "zerolith.log_format: rich is not installed; pip install 'zerolith[rich]'"
    assert f"rank 0 failed: {message}" in other
    assert first == second == [[], logging.NOTSET]


def test_a_form_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"zerolith\.log_format must be 'plain', 'json' or 'rich', not 'xml'"):
        zerolith.initialize(model=nn.Linear(4, 2), config=config_of("xml"))


def test_a_start_that_fails_on_another_rank_leaves_nothing_open(tmp_path: Path) -> None:
    def body() -> tuple[int, int]:
        section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
        rank = zerolith.comm.default_comm().rank
        model = nn.Linear(4, 2) if rank == 0 else None
        closed = []
        zerolith.observe.monitors.CsvMonitor.close = lambda self: closed.append(self)  # type: ignore[method-assign]
        with stderr(), pytest.raises(ZerolithError):
            zerolith.initialize(model=model, config=config_of("json", csv_monitor=section))
        return len(LOGGER.handlers), len(closed)

    assert run_ranks(2, body) == [(0, 1), (0, 0)]


# --- on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_loss_is_read_without_waiting_for_what_comes_after_it() -> None:
    engine = make_engine("json")
    watch = engine._watch
    loss = torch.tensor(2.0, device="cuda") * 1.5
    watch.saw_loss(loss, weight=1.0)
    torch.cuda._sleep(2_000_000_000)  # about a second
    assert watch._own_loss(2) == 3.0
    assert not torch.cuda.current_stream().query(), "the device still works on what came later"
    engine.destroy()
