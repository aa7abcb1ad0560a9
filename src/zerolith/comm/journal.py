"""What this rank has sent: a running fingerprint, the latest entries for a diff, and byte counts.

gloo gives wrong results without an error when ranks swap two collectives or differ in operation or dtype, so
ranks compare the fingerprint at the end of steps and stop if it differs.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque

import torch

KEPT_ENTRIES = 64


class Traffic:
    """Bytes that this rank has sent, by operation, as ring algorithms count them: (ranks - 1) / ranks of a buffer."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, op: str, sent: int) -> None:
        self.sent[op] += sent
        self.calls[op] += 1

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def clear(self) -> None:
        self.sent.clear()
        self.calls.clear()


class Journal:
    """Order-sensitive fingerprint of the collectives that this rank issued."""

    def __init__(self) -> None:
        self.count = 0
        self.fingerprint = 0  # 32 bits
        self._latest: deque[str] = deque(maxlen=KEPT_ENTRIES)

    def note(self, name: str, op: str, numel: int, dtype: torch.dtype) -> None:
        entry = f"{op} of {name}: {numel} x {str(dtype).removeprefix('torch.')}"
        self.fingerprint = zlib.crc32(entry.encode(), self.fingerprint)
        self.count += 1
        self._latest.append(f"#{self.count} {entry}")

    def latest(self) -> list[str]:
        """The last entries, oldest first."""
        return list(self._latest)

    def diff(self, others: dict[int, list[str]]) -> str:
        """The first place where the ranks' latest entries part, one line a rank."""
        # By the number that an entry begins with: ranks may keep different stretches of them.
        numbered = {rank: {int(entry[1:].split()[0]): entry for entry in entries} for rank, entries in others.items()}
        known_to_all = max(min(entries, default=1) for entries in numbered.values())
        for number in sorted({number for entries in numbered.values() for number in entries}):
            lines = {rank: entries.get(number, "(nothing)") for rank, entries in numbered.items()}
            if number >= known_to_all and len(set(lines.values())) > 1:
                return "; ".join(f"rank {rank}: {line}" for rank, line in lines.items())
        return "the difference is older than the entries that were kept"
