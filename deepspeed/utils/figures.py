"""Figures for people: counts, bytes and seconds in the unit that a number calls for. Pure.

Called by what prints tables, pages and profiles (`profiling`, `planner`, `autotuning`). Units are decimal, as clusters and chips are
sold; a number that rounding carries into the next unit is shown in that one.
"""

from __future__ import annotations

PREFIXES = ("", "K", "M", "G", "T", "P")


def number(value: float, unit: str = "", digits: int = 4) -> str:
    """A count with its unit: 4.09e9, "MACs" -> "4.09 GMACs". So many digits, and never an exponent, however large it is."""
    *smaller, largest = PREFIXES
    for prefix in smaller:
        if abs(value) < 999.95:
            return f"{value:.{digits}g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.{digits}g} {largest}{unit}" if abs(value) < 999.95 else f"{value:,.0f} {largest}{unit}"


def count(value: float) -> str:
    """Parameters, say: 70.55B, 3.41M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if _reaches(value, unit, 2):
            return f"{value / unit:,.2f}{letter}"
    return f"{value:g}"


def _reaches(value: float, unit: float, digits: int) -> bool:
    """Whether a value is to be shown in `unit`: also one that would round to a thousand of the unit before. The first has no digits."""
    return round(value / unit * 1e3, digits if unit > 1e3 else 0) >= 1000


def nbytes(value: float, digits: int = 1) -> str:
    """Bytes: 40.4 GB, 3.2 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if _reaches(value, unit, digits):
            return f"{value / unit:,.{digits}f} {name}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """Seconds: 5.71 s, 85.2 ms, 12.0 us."""
    if round(1e3 * value, 1) >= 1000:
        return f"{value:,.2f} s"
    return f"{1e3 * value:.1f} ms" if round(1e6 * value, 1) >= 1000 else f"{1e6 * value:.1f} us"


def many(value: int, noun: str) -> str:
    """A number with its noun: 1 node, 512 nodes."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"
