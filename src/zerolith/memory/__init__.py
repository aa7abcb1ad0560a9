"""Where buffers live. Device memory is torch's; host memory is kept in hand here."""

from zerolith.memory.host import (
    keep_freed_pages as keep_freed_pages,
    memory_of_host as memory_of_host,
    resident_bytes as resident_bytes,
)
from zerolith.memory.host_store import HostStore as HostStore, StagedSwap as StagedSwap
from zerolith.memory.pinned import locked_bytes as locked_bytes
from zerolith.memory.residency import Residency as Residency, Store as Store
from zerolith.memory.swap import Region as Region, SwapFile as SwapFile, Transfer as Transfer
