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


def start_ranks(script: Path, arguments: Sequence[str], *, ranks: int) -> NoReturn:
    """Replace this process by torchrun with `ranks` ranks."""
    sys.stdout.flush()
    command = torchrun_command(script, arguments, ranks=ranks)
    os.execv(command[0], command)
