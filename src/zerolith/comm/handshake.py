"""Ranks agree, or all of them stop with the same message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from zerolith.comm.communicator import Comm
from zerolith.errors import HandshakeError

SHOWN = 5  # differences that a message lists


def agree(
    comm: Comm, error: Exception | None, *, doing: str, kind: Callable[[str], Exception] = HandshakeError
) -> None:
    """Raise on every rank if any rank brings an error.

    Collective. The rank that failed raises its own error; the others raise `kind` with its text.
    """
    if not any(comm.max([float(error is not None)], name=f"agree on {doing}")):
        return
    text = "" if error is None else str(error) or type(error).__name__
    texts = comm.all_gather_bytes(text.encode(), name=f"errors while {doing}")
    if error is not None:
        raise error
    failed = [f"rank {rank} failed: {text.decode()}" for rank, text in enumerate(texts) if text]
    raise kind(f"{doing}: " + "; ".join(failed))


def handshake(comm: Comm, facts: Mapping[str, str]) -> None:
    """Compare what must be equal on all ranks before the first step.

    facts: one line of text by name (a config key, a parameter, a version). Collective. Raises HandshakeError
    on every rank, listing the facts that differ and each rank's value.
    """
    text = "\n".join(f"{name}\t{value}" for name, value in facts.items())
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # 48 bits: exact in fp64
    highest, negated_lowest = comm.max([float(digest), -float(digest)], name="handshake")
    if highest == -negated_lowest:
        return
    rows = [row.decode() for row in comm.all_gather_bytes(text.encode(), name="handshake facts")]
    tables = [dict(line.split("\t", 1) for line in row.split("\n")) for row in rows]
    lines = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, "(missing)") for table in tables]
        if len(set(values)) > 1:
            lines.append(f"{name}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values)))
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    raise HandshakeError("ranks were started with different settings: " + "; ".join(lines[:SHOWN]) + more)
