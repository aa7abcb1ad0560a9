"""A peer in a process of its own, as it may live in another environment. Speaks JSON lines; no torch here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any

PREFIX = "@"  # of answers: libraries print lines of their own


class Peer:
    """Runs `script` by the interpreter `python`: a line when it is ready, and one for each request."""

    def __init__(self, python: str, script: Path, facts: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(facts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(python).parent}:{os.environ['PATH']}"},
        )
        self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError if the process has ended."""
        self._pipe(self.process.stdin).write(json.dumps(request) + "\n")
        self._pipe(self.process.stdin).flush()
        return self._answer()

    def close(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        for line in self._pipe(self.process.stdout):
            if line.startswith(PREFIX):
                return json.loads(line.removeprefix(PREFIX))
        raise RuntimeError(f"{self.process.args[1]}: the process ended; see its messages above.")

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None, "both pipes are open"
        return pipe
