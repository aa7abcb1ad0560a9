"""What rich makes of the log: lines anywhere, and a bar of steps on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from harness import run_ranks
from logs import make_engine, step, steps_in, train

DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": 3, "warmup_num_steps": 2, "warmup_max_lr": 0.1}}


def test_rich_writes_plain_lines_where_there_is_no_terminal() -> None:
    (text, losses, norms), (other, _, _) = run_ranks(2, train, "rich", [1.0] * 4, {})
    assert other == ""
    assert "\x1b" not in text
    assert "\r" not in text
    first, *_, last = text.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    zerolith: 10 parameters in .*, SGD", first), "long lines stay whole"
    line = f"step 4: loss {losses[3]:.4g}, lr 0.0625, grad norm {norms[3]:.4g}, skipped 0"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d INFO    {re.escape(line)}", last)


def on_terminal(body: Callable[[], Any]) -> tuple[str, Any]:
    """What `body` writes to a terminal of 100 columns that is its stderr, and what it returns."""
    os.environ.update(TERM="xterm", COLUMNS="100")
    os.environ.pop("NO_COLOR", None)
    main, side = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(main, 65536):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as terminal, contextlib.redirect_stderr(terminal):
        result = body()
    reader.join(timeout=10)
    return b"".join(pieces).decode(), result


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def with_bar(schedule: dict[str, Any] | None, num_engines: int) -> list[str]:
    """What is on the terminal after each step of the first engine, and at the end."""
    from zerolith.observe import bar

    bar.REDRAW_S = 0.0
    more = {} if schedule is None else {"scheduler": schedule}

    def body() -> None:
        engines = [make_engine("rich", **more) for _ in range(num_engines)]
        print("from the application", file=sys.stderr)
        for _ in range(4):
            for engine in engines:
                step(engine)
            print("between", file=sys.stderr)
        for engine in engines:
            engine.destroy()

    return on_terminal(body)[0].split("\x1b[2K")


def test_a_terminal_has_a_bar_of_steps_below_the_lines() -> None:
    pieces = run_ranks(1, with_bar, DECAY, 1)[0]
    shown = [visible(piece).strip() for piece in pieces]
    assert "zerolith: 10 parameters" in shown[0]
    assert "\nstep" not in shown[0], "no bar before the first step"
    bars = [re.match(r"step (\d)/3 loss \S+, lr \S+, grad norm \S+ ", piece) for piece in shown]
    assert {found[1] for found in bars if found} == {"1", "2", "3"}
    assert any(re.search(r" \d+\.\d+ steps/s, \d:\d\d:\d\d +━", piece) for piece in shown), "speed, time left, bar"
    assert any("━" in piece for piece in shown)
    assert any(re.match(r"\d\d:\d\d:\d\d INFO    step 2: loss ", piece) for piece in shown), "a line above it"
    assert any(piece.startswith("between\r\nstep 2/3") for piece in shown), "what else is printed is above it, too"
    assert any(piece.startswith("step 4 loss") for piece in shown), "more steps than the schedule's have no end"
    assert pieces[-1].rstrip().endswith("\x1b[?25h"), "the cursor is there again"


def test_a_bar_whose_end_is_not_known_counts() -> None:
    shown = [visible(piece).strip() for piece in run_ranks(1, with_bar, None, 1)[0]]
    assert any(re.match(r"step 3 loss \S+, lr 0\.5, grad norm \S+ +\d+\.\d+ steps/s$", piece) for piece in shown)
    assert not any("━" in piece for piece in shown)


def test_every_engine_has_its_bar() -> None:
    text = visible("".join(run_ranks(1, with_bar, None, 2)[0]))
    assert re.search(r"step 4 loss [^\n]*\n[^\n]*step 4 loss", text)


# --- a whole script ---------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, zerolith
config = {"train_batch_size": 4, "steps_per_print": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
          "zerolith": {"log_format": sys.argv[1]}}
engine = zerolith.initialize(model=torch.nn.Linear(4, 2), config=config)[0]
for number in range(3):
    if number == 2:
        raise RuntimeError("not today")
    engine.backward(engine(torch.ones(4, 4)).square().mean())
    engine.step()
    print("on stdout")
"""


def test_a_script_that_fails_leaves_the_terminal_as_it_was() -> None:
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SCRIPT, "rich"]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, env=environment)
    os.close(side)
    text = b""
    with contextlib.suppress(OSError):
        while piece := os.read(main, 65536):
            text += piece
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 1
    assert out == b"on stdout\non stdout\n", "stdout is no terminal, so it is left alone"
    assert b"RuntimeError: not today" in text
    assert text.rstrip().endswith(b"\x1b[?25h")


def test_a_script_writes_nothing_but_json_to_stderr() -> None:
    command = [sys.executable, "-c", SCRIPT.replace("range(3)", "range(2)"), "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "on stdout\non stdout\n"
    assert [record["step"] for record in steps_in(done.stderr)] == [1, 2]
