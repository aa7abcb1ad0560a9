"""Ranks that answer, die or hang. A shell script stands in for the interpreter: no torch is imported."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from benchmarks.fleet import Fleet, Host, TimeIsUpError, WorkerDiedError
from benchmarks.job import Job

JOB = Job(engine="ddp", size="tiny", dtype="fp32", device="cpu")
ECHO = """echo "{\\"rank\\": $RANK}"
while read line; do case "$line" in *close*) exit;; *) echo "$line";; esac; done
"""
RANK_1_DIES = 'if [ "$RANK" = 1 ]; then echo "no such device" >&2; exit 3; fi\nsleep 60\n'
HANGS = 'echo "$$" > "$(dirname "$0")/pid"\nsleep 60\n'


def host(folder: Path, script: str, *, seconds: float = 20.0) -> Host:
    python = folder / "python"
    python.write_text("#!/bin/sh\n" + script)
    python.chmod(0o755)
    return Host(world=2, pythons={"": str(python)}, threads=1, logs=folder, deadline=time.monotonic() + seconds)


def test_answers_come_in_rank_order(tmp_path: Path) -> None:
    with Fleet(host(tmp_path, ECHO)) as fleet:
        assert fleet.start(JOB) == [{"rank": 0}, {"rank": 1}]
        assert fleet.ask("ddp", {"do": "train", "steps": 2}) == [{"do": "train", "steps": 2}] * 2
        assert fleet.num_ranks("ddp") == 2


def test_a_dead_rank_ends_the_run_with_its_stderr(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"rank 1 \(exit status 3\)(.|\n)*no such device"):
        with Fleet(host(tmp_path, RANK_1_DIES)) as fleet:
            fleet.start(JOB)
    assert time.monotonic() - begin < 10


def test_a_run_that_takes_too_long_ends_with_its_processes(tmp_path: Path) -> None:
    with pytest.raises(TimeIsUpError, match="max-minutes"):
        with Fleet(host(tmp_path, HANGS, seconds=0.5)) as fleet:
            fleet.start(JOB)
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
