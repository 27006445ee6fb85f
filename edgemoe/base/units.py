"""This module converts sizes between text and bytes; kB, MB, GB are powers of 1000, and KiB, MiB, GiB are powers of 1024."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from edgemoe.base.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?(b)?\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes in a size such as "128GB", "119.2GiB", "64Gi", "24g" or "123456B" (fractions of a byte are cut).

    Raises:
        UsageError: not a size, or a number without a unit.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is not a size", hint="write it like 128GB (10^9) or 119.2GiB (2^30)")
    number, unit, byte = match.groups()
    if not unit and not byte:
        raise UsageError(f"the size {text!r} has no unit", hint=f"write {number}GB, {number}GiB or {number}B")
    size = int(Decimal(number) * _UNITS[(unit or "").lower()])
    if size <= 0:
        raise UsageError(f"the size {text!r} is not positive", hint="write it like 128GB or 119.2GiB")
    return size


def format_bytes(size: int) -> str:
    """A size in both conventions: "16.64 MB (15.87 MiB)"."""
    return f"{_scaled(size, 1000, 'kMGT', 'B')} ({_scaled(size, 1024, 'KMGT', 'iB')})" if abs(size) >= 1000 else f"{size} B"


def _scaled(size: int, base: int, prefixes: str, suffix: str) -> str:
    value, prefix = float(size), ""
    for letter in prefixes:
        if abs(value) < base:
            break
        value, prefix = value / base, letter
    return f"{value:.2f} {prefix}{suffix if prefix else 'B'}"


def format_seconds(seconds: float) -> str:
    """A duration as people read it: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def round_outwards(value: float, *, up: bool, digits: int = 5) -> str:
    """A number with few digits that is not below (`up`) or not above the value, as people would write it into a rule."""
    if value == round(value) and abs(value) < 10**digits:
        return str(round(value))
    exact = Decimal(value)
    context = Context(prec=digits, rounding=ROUND_CEILING if up else ROUND_FLOOR)
    return f"{context.create_decimal(exact):f}"


def plain(text: object) -> str:
    """The text as one printable line, without control, escape or direction characters, which a hostile name could send to a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
