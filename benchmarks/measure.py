"""Readings of this machine: memory, network, processors, versions. Standard library only; /proc is Linux."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

KIB_PER_MB = 1_000_000 / 1024
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # of x86; without either, bf16 arithmetic is emulated
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def parse_status_mb(status: str, field: str) -> float:
    """A kB field of /proc/PID/status, such as VmHWM (peak) or VmRSS (now), in MB of 10^6 bytes."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / KIB_PER_MB
    raise ValueError(f"no field {field!r} in the process status.")


def process_mb(field: str) -> float:
    return parse_status_mb(Path("/proc/self/status").read_text(), field)


def parse_sent_bytes(net_dev: str, interface: str) -> int:
    """Bytes sent over one interface, from the text of /proc/net/dev."""
    for line in net_dev.splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == interface:
            return int(counters.split()[8])  # eight receive counters come first
    raise ValueError(f"no interface {interface!r} in /proc/net/dev.")


def loopback_bytes() -> int:
    """Bytes sent over loopback since boot, by every process of this machine."""
    return parse_sent_bytes(Path("/proc/net/dev").read_text(), "lo")


def parse_busy_s(stat: str) -> float:
    """Processor seconds spent on anything, all cores together, from the text of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / CLOCK_TICKS


def busy_s() -> float:
    return parse_busy_s(Path("/proc/stat").read_text())


def hardware() -> dict[str, object]:
    """What a reader needs to judge the numbers."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in cpuinfo if line.startswith("flags") for flag in line.split()}
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages * page_bytes / 1e9, 1),
        "bf16_instructions": [flag for flag in BF16_FLAGS if flag in flags],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def default_device() -> str:
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def git_state(root: Path) -> dict[str, object]:
    """The commit a result belongs to, and whether the package or the benchmarks differ from it."""
    commit = _git(root, ["rev-parse", "--verify", "HEAD"])
    return {
        "commit": commit,
        "dirty": bool(_git(root, ["status", "--porcelain", "--", "src", "benchmarks/*.py"])),
    }


def _git(root: Path, arguments: Sequence[str]) -> str | None:
    """What git prints, or None where it has no answer."""
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """The command to quote in a result; absolute paths are cut to their last two parts."""
    shown = ["/".join(["...", *Path(arg).parts[-2:]]) if arg.startswith("/") else arg for arg in arguments]
    return " ".join(["python", "-m", module, *shown])
