"""A rank's process. Obeys JSON lines on stdin and answers in JSON lines on what was stdout.

    {"do": "train", "steps": n}      runs n steps
    {"do": "profile", "steps": n}    runs n steps under torch.profiler; rank 0 answers with its table
    {"do": "close"}                  leaves

What libraries print goes to stderr. A rank that fails prints its traceback there and dies.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from benchmarks.job import Job

if TYPE_CHECKING:
    from benchmarks.rank import Rank


class Answers:
    """The line back to the driver."""

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # prints, also of native code and child processes, must not reach the driver

    def send(self, answer: dict[str, object]) -> None:
        self._pipe.write(json.dumps(answer) + "\n")
        self._pipe.flush()


def serve(rank: Rank, answers: Answers) -> None:
    """Until told to close, or until the driver is gone."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "close":
            rank.engine.close()
            return
        if command["do"] == "profile":
            answers.send({"table": rank.profile(command["steps"])})
            continue
        cpu = time.process_time()
        steps = rank.train(command["steps"])
        answers.send({"steps": steps, "cpu_s": time.process_time() - cpu, **rank.memory()})


def main() -> None:
    answers = Answers()
    begin = time.perf_counter()
    try:
        from benchmarks.rank import Rank  # imported here: how long torch takes is one of the results

        import_torch_s = time.perf_counter() - begin
        rank = Rank(Job.from_json(sys.argv[1]))
        answers.send({**rank.start(), "import_torch_s": import_torch_s})
        serve(rank, answers)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a clean exit could wait for ranks that wait for this one


if __name__ == "__main__":
    main()
