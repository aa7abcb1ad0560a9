"""Becoming several ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def torchrun_command(script: Path, arguments: Sequence[str], *, ranks: int) -> list[str]:
    """The command that runs `script` with the same arguments on `ranks` ranks of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}", str(script), *arguments]


def threads_per_rank(ranks: int) -> int:
    """Threads that let `ranks` processes share this machine's processors."""
    return max(1, (os.cpu_count() or 1) // ranks)


def start_ranks(script: Path, arguments: Sequence[str], *, ranks: int) -> NoReturn:
    """Replace this process by torchrun with `ranks` ranks."""
    sys.stdout.flush()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
    command = torchrun_command(script, arguments, ranks=ranks)
    os.execv(command[0], command)
