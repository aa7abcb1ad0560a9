"""Step time and memory of zerolith beside its peers: same GPT, data, seed and dtype, interleaved in one run.

python -m benchmarks.step_time --engines ddp,zero1,zero3 --size 25m --dtype bf16
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks import report
from benchmarks.engines import ENGINES
from benchmarks.fleet import ROOT, Fleet, Host, TimeIsUpError, WorkerDiedError
from benchmarks.interleave import Record, run
from benchmarks.job import DTYPES, PRODUCTS, SIZES, Job
from benchmarks.measure import default_device, git_state, hardware, shown_command

RESULTS = ROOT / "benchmarks" / "results"
NOISY_BYTES_PER_S = 100_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, checked."""

    jobs: list[Job]
    baseline: str
    world: int
    num_rounds: int
    warmup_rounds: int
    chunk: int

    @property
    def title(self) -> str:
        job = self.jobs[0]
        return (
            f"{job.size} {job.dtype}, world {self.world}, micro batch {job.micro_batch} x seq {job.seq}, "
            f"{(self.num_rounds - self.warmup_rounds) * self.chunk} counted steps in turns of {self.chunk}"
        )


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What step_time and profile_step ask alike."""
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--world", type=int, default=2, help="ranks per engine; CUDA: at most the devices")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of a rank")
    parser.add_argument("--deepspeed-python", default=sys.executable, help="interpreter that has DeepSpeed")
    parser.add_argument("--bf16-products", choices=PRODUCTS, help="default: fp32 on a CPU without bf16 instructions")
    parser.add_argument("--max-minutes", type=float, default=20.0, help="the run fails when it takes longer")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default="ddp,fsdp2,zero0,zero1,zero2,zero3", help=",".join(ENGINES))
    add_job_arguments(parser)
    parser.add_argument("--steps", type=int, default=20, help="steps of every engine, warm-up included")
    parser.add_argument("--chunk", type=int, default=2, help="steps per turn")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("--baseline", help="engine of the paired ratios; ddp where it runs, else the first")
    parser.add_argument("--json", type=Path, help="where to write all samples; default: benchmarks/results/")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def make_job(arguments: argparse.Namespace, engine: str) -> Job:
    if engine not in ENGINES:
        raise SystemExit(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}.")
    return Job(
        engine=engine,
        size=arguments.size,
        dtype=arguments.dtype,
        device=arguments.device,
        micro_batch=arguments.micro_batch,
        seq=arguments.seq,
        seed=arguments.seed,
        lr=arguments.lr,
        products=arguments.bf16_products or default_products(arguments.device, arguments.dtype),
    )


def default_products(device: str, dtype: str) -> str:
    """How bf16 matrices are multiplied unless the command says so."""
    return "fp32" if (device, dtype) == ("cpu", "bf16") and not hardware()["bf16_instructions"] else "native"


def make_host(arguments: argparse.Namespace, logs: Path) -> Host:
    deepspeed_python = shutil.which(arguments.deepspeed_python)
    if deepspeed_python is None:
        raise SystemExit(f"--deepspeed-python {arguments.deepspeed_python!r} is not a program.")
    return Host(
        world=arguments.world,
        # Not resolved: a virtual environment's python is a link to another's.
        pythons={"": sys.executable, "deepspeed": str(Path(deepspeed_python).absolute())},
        threads=arguments.threads,
        logs=logs,
        deadline=time.monotonic() + 60 * arguments.max_minutes,
    )


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Rounds from steps. Exits with a message where the numbers do not fit."""
    engines = list(dict.fromkeys(arguments.engines.split(",")))
    jobs = [make_job(arguments, engine) for engine in engines]
    baseline = arguments.baseline or ("ddp" if "ddp" in engines else engines[0])
    if baseline not in engines:
        raise SystemExit(f"the baseline {baseline!r} is not among the engines {','.join(engines)}.")
    chunk = arguments.chunk
    num_rounds, warmup_rounds = arguments.steps // chunk, -(-arguments.warmup // chunk)
    if arguments.steps % chunk or num_rounds <= warmup_rounds:
        raise SystemExit(
            f"--steps {arguments.steps} must be a multiple of --chunk {chunk} and leave a round after "
            f"{warmup_rounds} of warm-up."
        )
    return Plan(
        jobs=jobs,
        baseline=baseline,
        world=arguments.world,
        num_rounds=num_rounds,
        warmup_rounds=warmup_rounds,
        chunk=chunk,
    )


def measure(plan: Plan, host: Host) -> Record:
    with Fleet(host) as fleet:
        return run(fleet, plan.jobs, num_rounds=plan.num_rounds, chunk=plan.chunk, say=say)


def notes_on(plan: Plan, record: Record, machine: dict[str, object]) -> list[str]:
    """What a reader of the table must know."""
    loudest = max(record.idle_bytes_per_s)
    notes = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; foreign cores = processors "
        "busy with other work during the engine's turns.",
    ]
    job = plan.jobs[0]
    if job.products == "fp32":
        notes.append(
            "This processor has no bf16 instructions: every engine's products of bf16 matrices, attention's too, are "
            "made in fp32 and rounded to bf16, which costs fp32's time and the casts."
        )
    elif (job.device, job.dtype) == ("cpu", "bf16") and not machine["bf16_instructions"]:
        notes.append("This processor has no bf16 instructions: bf16 is emulated, and slower than fp32.")
    if huge_pages():
        notes.append("THP_MEM_ALLOC_ENABLE=1 for every engine: torch asks for huge pages for its larger tensors.")
    if loudest > NOISY_BYTES_PER_S:
        notes.append(f"Other traffic on loopback, up to {loudest / 1e6:.1f} MB/s: wire MB is an upper bound.")
    return notes


def huge_pages() -> bool:
    """Whether torch was told to ask for them; its switch is this variable."""
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"


def describe(plan: Plan, arguments: argparse.Namespace, record: Record, argv: Sequence[str]) -> dict[str, object]:
    """Everything in a result but the numbers."""
    settings = {name: getattr(arguments, name) for name in ("world", "threads", "steps", "chunk", "warmup")}
    job = plan.jobs[0]
    return {
        "title": plan.title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **git_state(ROOT),
        "command": shown_command("benchmarks.step_time", argv),
        "hardware": hardware(),
        "devices": sorted({start.answers[0]["device"] for start in record.starts.values()}),
        "versions": {engine: start.answers[0]["versions"] for engine, start in record.starts.items()},
        "settings": {
            **settings,
            **{name: getattr(job, name) for name in ("size", "dtype", "products", "micro_batch", "seq", "seed", "lr")},
            "num_params": next(iter(record.starts.values())).answers[0]["num_params"],
            "baseline": plan.baseline,
            "huge_pages": huge_pages(),
        },
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def stop_on(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds through Fleet, which ends the ranks


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    plan = make_plan(arguments)
    signal.signal(signal.SIGTERM, stop_on)
    with tempfile.TemporaryDirectory(prefix="step_time-") as logs:
        try:
            record = measure(plan, make_host(arguments, Path(logs)))
        except (WorkerDiedError, TimeIsUpError) as error:
            say(str(error))
            return 1
    tokens = arguments.micro_batch * arguments.seq
    rows = report.summarise(record, baseline=plan.baseline, warmup_rounds=plan.warmup_rounds, tokens_per_rank=tokens)
    result = describe(plan, arguments, record, argv)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    default = RESULTS / f"{stamp}-{arguments.size}-{arguments.dtype}-w{arguments.world}.json"
    report.write(arguments.json or default, result, record, rows)
    notes = notes_on(plan, record, hardware())
    table = report.markdown(rows, baseline=plan.baseline, title=plan.title, notes=notes)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
