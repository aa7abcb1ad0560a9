"""Collectives: the only package that calls torch.distributed to move data.

A Comm is one axis of ranks. It picks the fastest primitive of its backend, adds in rank order where bits
matter, counts bytes, and keeps a journal from which ranks learn that they issued the same collectives.
"""

from zerolith.comm.communicator import Comm, Pending, done
from zerolith.comm.handshake import agree, handshake
from zerolith.comm.journal import Journal, Traffic
from zerolith.comm.ordered import add_into
from zerolith.comm.pool import Pool
from zerolith.comm.start import TIMEOUT, default_comm, init_distributed, is_distributed

__all__ = [
    "TIMEOUT",
    "Comm",
    "Journal",
    "Pending",
    "Pool",
    "Traffic",
    "add_into",
    "agree",
    "default_comm",
    "done",
    "handshake",
    "init_distributed",
    "is_distributed",
]
