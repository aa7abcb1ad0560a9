"""Bytes and counts as people write them."""

import argparse
import re

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)


def size_text(nbytes: int) -> str:
    """At least three digits, in units of a thousand: 526 kB, 1.20 GB."""
    amount, unit = float(nbytes), 0
    while amount >= 999.5 and unit + 1 < len(UNITS):
        amount, unit = amount / 1000, unit + 1
    digits = 0 if unit == 0 or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{amount:.{digits}f} {UNITS[unit]}"


def many(count: int, noun: str) -> str:
    """The count and the noun, with an s if it needs one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(text: str) -> int:
    """Bytes of 5GB (a thousand to the third), 5GiB (1024), 200M or 4096, for argparse."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    amount, unit, is_binary = match.groups()
    nbytes = int(float(amount) * (1024 if is_binary else 1000) ** " kmgtp".index(unit.lower() or " "))
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a byte")
    return nbytes


def at_least_one(text: str) -> int:
    """A count of one or more, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
