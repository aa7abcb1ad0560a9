"""Readings of /proc, from texts of /proc."""

from __future__ import annotations

import os

import pytest
from benchmarks.measure import parse_busy_s, parse_sent_bytes, parse_status_mb, process_mb, shown_command

NET_DEV = """\
Inter-|   Receive                          |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls
    lo: 1000 10 0 0 0 0 0 0     4321 10 0 0 0 0 0 0
  eth0:99999999999 7 0 0 0 0 0 0 88888888888 5 0 0 0 0 0 0
"""
STATUS = "Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t  250000 kB\nVmRSS:\t  125000 kB\nThreads:\t3\n"


@pytest.mark.parametrize(("interface", "sent"), [("lo", 4321), ("eth0", 88888888888)])
def test_sent_bytes_are_the_first_transmit_counter(interface: str, sent: int) -> None:
    assert parse_sent_bytes(NET_DEV, interface) == sent


def test_an_interface_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="ib0"):
        parse_sent_bytes(NET_DEV, "ib0")


@pytest.mark.parametrize(("field", "mb"), [("VmHWM", 256.0), ("VmRSS", 128.0)])
def test_memory_is_in_units_of_a_million_bytes(field: str, mb: float) -> None:
    assert parse_status_mb(STATUS, field) == pytest.approx(mb)


def test_peak_is_at_least_what_is_resident() -> None:
    assert process_mb("VmHWM") >= process_mb("VmRSS") > 1


def test_busy_time_leaves_out_idle_and_waiting() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"cpu  {ticks} {2 * ticks} {3 * ticks} 1000 1000 {4 * ticks} {5 * ticks} 0 0 0\ncpu0 1 1 1 1 1 1 1\n"
    assert parse_busy_s(stat) == 15


def test_a_quoted_command_holds_no_home_directory() -> None:
    arguments = ["--size", "25m", "--deepspeed-python", "/home/someone/venv/bin/python"]
    assert shown_command("m", arguments) == "python -m m --size 25m --deepspeed-python .../bin/python"
