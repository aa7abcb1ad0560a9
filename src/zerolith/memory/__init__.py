"""Where buffers live. Device memory is torch's; host memory is kept in hand here."""

from zerolith.memory.host import keep_freed_pages as keep_freed_pages, resident_bytes as resident_bytes
from zerolith.memory.swap import Region as Region, SwapFile as SwapFile, Transfer as Transfer
