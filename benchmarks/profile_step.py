"""Where one engine's step goes: torch.profiler's table of self time per operator, of rank 0.

python -m benchmarks.profile_step --engine zero3 --size 25m --dtype bf16
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines import ENGINES
from benchmarks.fleet import Fleet, TimeIsUpError, WorkerDiedError
from benchmarks.step_time import add_job_arguments, make_host, make_job, say, stop_on


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.profile_step", description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="zero3")
    add_job_arguments(parser)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the profiled ones")
    parser.add_argument("--steps", type=int, default=2, help="profiled steps; the table sums over them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, stop_on)
    with tempfile.TemporaryDirectory(prefix="profile_step-") as logs:
        try:
            with Fleet(make_host(arguments, Path(logs))) as fleet:
                fleet.start(make_job(arguments, arguments.engine))
                fleet.ask(arguments.engine, {"do": "train", "steps": arguments.warmup})
                answers = fleet.ask(arguments.engine, {"do": "profile", "steps": arguments.steps})
        except (WorkerDiedError, TimeIsUpError) as error:
            say(str(error))
            return 1
    print(f"{arguments.engine} {arguments.size} {arguments.dtype}, rank 0, sum of {arguments.steps} steps")
    print(answers[0]["table"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
