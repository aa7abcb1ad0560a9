"""Collectives: the only package that calls torch.distributed to move data.

A Comm is one axis of ranks. It picks the fastest primitive of its backend, adds in rank order where bits
matter, counts bytes, and keeps a journal from which ranks learn that they issued the same collectives.
"""

from zerolith.comm.clock import CommsLog as CommsLog, Timing as Timing
from zerolith.comm.communicator import Comm as Comm, Pending as Pending, done as done
from zerolith.comm.handshake import agree as agree, handshake as handshake
from zerolith.comm.journal import Journal as Journal, Traffic as Traffic
from zerolith.comm.ordered import add_into as add_into, block_squares as block_squares
from zerolith.comm.pool import Pool as Pool
from zerolith.comm.start import (
    TIMEOUT as TIMEOUT,
    default_comm as default_comm,
    init_distributed as init_distributed,
    is_distributed as is_distributed,
    ranks_on_this_host as ranks_on_this_host,
    side_comm as side_comm,
)
