"""The `zerolith` command. A file `<noun>_commands.py` in this folder adds its own subcommands."""

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

from zerolith.errors import ZerolithError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for what the user can correct."""
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ZerolithError as error:
        print(f"zerolith: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zerolith", description="ZeRO for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        if module.endswith("_commands"):
            import_module(f"{__name__}.{module}").add_commands(commands)
    return parser
