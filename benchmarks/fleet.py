"""The processes of a run: starts ranks, speaks with them, ends them. Standard library only."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.engines import ENGINES
from benchmarks.job import Job

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 30
CLOSE_TIMEOUT_S = 30.0
GRACE_S = 0.5  # the first rank found dead may be the victim of another
LOCALHOST = "127.0.0.1"

# Any: JSON. An answer's fields are named in rank.py and worker.py.
Answer = dict[str, Any]


class WorkerDiedError(RuntimeError):
    """A rank ended without being told to."""


class TimeIsUpError(RuntimeError):
    """The run passed its bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the ranks of every engine of a run share."""

    world: int
    pythons: Mapping[str, str]  # interpreter by library, under "" for all others
    threads: int  # OMP_NUM_THREADS of a rank
    logs: Path  # folder for the ranks' stderr
    deadline: float  # on time.monotonic

    def python_for(self, job: Job) -> str:
        return self.pythons.get(ENGINES[job.engine].library, self.pythons[""])


class Ranks:
    """The processes of one engine, in rank order."""

    def __init__(self, job: Job, host: Host) -> None:
        self.job = job
        self.host = host
        self.num_ranks = min(host.world, ENGINES[job.engine].max_ranks or host.world)
        self._port = _free_port()
        self._answers: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> list[Answer]:
        """Starts all ranks and returns what each says once its engine is built."""
        for rank in range(self.num_ranks):
            process = self._spawn(rank)
            self._processes.append(process)
            assert process.stdout is not None, "a rank's stdout is a pipe"
            threading.Thread(target=self._listen, args=(rank, process.stdout), daemon=True).start()
        return self._collect()

    def ask(self, command: Mapping[str, object]) -> list[Answer]:
        """Sends one command to every rank and returns their answers in rank order."""
        self._send(command)
        return self._collect()

    def close(self) -> None:
        """Asks the ranks to leave, then makes sure."""
        # Its numbers are in; how it leaves is not measured.
        with suppress(subprocess.TimeoutExpired, WorkerDiedError):
            self._send({"do": "close"})
            for process in self._processes:
                process.wait(CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Ends the ranks and all that they started, and removes what DeepSpeed leaves in shared memory."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{LOCALHOST}_{self._port}_*"):
            left.unlink(missing_ok=True)

    def _spawn(self, rank: int) -> subprocess.Popen[str]:
        python = self.host.python_for(self.job)
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [python, "-m", "benchmarks.worker", self.job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._environment(rank, python)},
                start_new_session=True,  # so that kill() reaches compilers that the rank started
            )

    def _environment(self, rank: int, python: str) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")]),
            "OMP_NUM_THREADS": str(self.host.threads),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": LOCALHOST,
            "MASTER_PORT": str(self._port),
        }
        if self.job.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return environment

    def _listen(self, rank: int, pipe: IO[str]) -> None:
        for line in pipe:
            self._answers.put((rank, line))
        self._answers.put((rank, None))

    def _send(self, command: Mapping[str, object]) -> None:
        for process in self._processes:
            assert process.stdin is not None, "a rank's stdin is a pipe"
            try:
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._death() from None

    def _collect(self) -> list[Answer]:
        answers: dict[int, Answer] = {}
        while len(answers) < self.num_ranks:
            try:
                rank, line = self._answers.get(timeout=max(0.0, self.host.deadline - time.monotonic()))
            except queue.Empty:
                raise TimeIsUpError(
                    f"{self.job.engine}: no answer when the run's time was up; see --max-minutes. "
                    f"stderr of rank 0:\n{self._tail(0)}"
                ) from None
            if line is None:
                raise self._death()
            answers[rank] = json.loads(line)
        return [answers[rank] for rank in range(self.num_ranks)]

    def _death(self) -> WorkerDiedError:
        time.sleep(GRACE_S)
        dead = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
        tails = [
            f"rank {rank} (exit status {self._processes[rank].returncode}), stderr:\n{self._tail(rank)}"
            for rank in dead
        ]
        return WorkerDiedError("\n".join([f"{self.job.engine}: {len(dead)} ranks died.", *tails]))

    def _log(self, rank: int) -> Path:
        return self.host.logs / f"{self.job.engine}-{rank}.log"

    def _tail(self, rank: int) -> str:
        return "\n".join(self._log(rank).read_text(errors="replace").splitlines()[-TAIL_LINES:])


class Fleet:
    """The engines of a run. Leaving the `with` block ends them all, whatever happened."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._engines: dict[str, Ranks] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ranks in self._engines.values():
            if kind is None:
                ranks.close()
            else:
                ranks.kill()

    def start(self, job: Job) -> list[Answer]:
        """Starts one engine; returns when it is built, so that the next one starts on a quiet machine."""
        ranks = Ranks(job, self.host)
        self._engines[job.engine] = ranks
        return ranks.start()

    def ask(self, engine: str, command: Mapping[str, object]) -> list[Answer]:
        return self._engines[engine].ask(command)

    def num_ranks(self, engine: str) -> int:
        return self._engines[engine].num_ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port
