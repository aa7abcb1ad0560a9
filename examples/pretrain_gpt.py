"""Pretrain a small GPT on the Python standard library's source text with ZeRO.

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --config examples/configs/zero3_bf16.json
    python examples/pretrain_gpt.py --ranks 2 --stage 2 --precision fp32

It needs no download: the corpus is the running interpreter's own library. `--help` lists the options;
README.md beside this file says what a run leaves behind.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpt.launch import start_ranks
from gpt.settings import ArgumentsError, Settings, read_settings

EXTRAS = ("matplotlib", "tensorboard", "tqdm")
WRONG_ARGUMENTS = 2  # exit status, as argparse has it


def check_extras() -> None:
    """Raises ArgumentsError if what only the examples import is not there."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentsError(f"{', '.join(missing)} not installed; pip install 'zerolith[examples]'")


def train(settings: Settings, *, started: float) -> None:
    """Train as one of the ranks."""
    # Imported late: wrong arguments need not wait for torch, and the parent of the ranks does not need it.
    from gpt.data import CorpusError
    from gpt.run import pretrain
    from zerolith.errors import ConfigError

    try:
        pretrain(settings, started=started)
    except (ConfigError, CorpusError) as error:
        raise ArgumentsError(str(error)) from error


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    started = time.monotonic()
    try:
        settings = read_settings(arguments, environment=os.environ)
        check_extras()
        if settings.start_ranks:
            start_ranks(Path(__file__), arguments, ranks=settings.ranks)
        train(settings, started=started)
    except ArgumentsError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain_gpt.py: error: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
