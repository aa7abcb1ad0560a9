"""The collectives that a save needs, over pipes: ranks are up without a process group, as processes or as threads."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from zerolith.errors import PeerLostError

Links = list[dict[int, Connection]]  # by rank: its connections to other ranks


def make_links(world: int) -> Links:
    """A star: rank 0 is connected to every other rank."""
    links: Links = [{} for _ in range(world)]
    for rank in range(1, world):
        links[0][rank], links[rank][0] = Pipe()
    return links


def close_links(links: Links, *, but: int = -1) -> None:
    """Drop all ends except for those of one rank, which learns only so that another one has died."""
    for rank, ends in enumerate(links):
        for end in ends.values() if rank != but else ():
            end.close()


class PipeComm:
    """What zerolith.comm.Comm offers to a Saver."""

    def __init__(self, rank: int, links: Links) -> None:
        self.rank, self.size = rank, len(links)
        self._links = links[rank]

    def max(self, values: Sequence[float], *, name: str) -> list[float]:
        """Element-wise maximum over ranks."""
        rows = [pickle.loads(row) for row in self.all_gather_bytes(pickle.dumps(list(values)), name=name)]
        return [max(column) for column in zip(*rows, strict=True)]

    def all_gather_bytes(self, payload: bytes, *, name: str) -> list[bytes]:
        """Every rank's payload, by rank. Fails if ranks do not issue the same collectives in the same order."""
        try:
            return self._exchange(name, payload)
        except (EOFError, OSError) as error:
            raise PeerLostError(f"the collective {name!r} failed: another rank died") from error

    def _exchange(self, name: str, payload: bytes) -> list[bytes]:
        if self.rank:
            self._links[0].send((name, payload))
            return list(self._links[0].recv())
        received = [(name, payload), *(self._links[rank].recv() for rank in range(1, self.size))]
        assert {each for each, _ in received} == {name}, f"ranks are in different collectives: {received}"
        rows = [row for _, row in received]
        for link in self._links.values():
            link.send(rows)
        return rows
