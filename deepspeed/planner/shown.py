"""Figures for people, in the units of the planner's tables: decimal bytes, as clusters are sold, and the unit that a number calls for. Pure.

Called by the command's table (`cli`) and the page (`page`).
"""

from __future__ import annotations


def count(number: float) -> str:
    """Parameters, say: 70.55B, 3.41M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:,.2f}{letter}"
    return f"{number:g}"


def nbytes(number: float, digits: int = 1) -> str:
    """Bytes: 40.4 GB, 3.2 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:,.{digits}f} {name}"
    return f"{number:.0f} B"


def seconds(number: float) -> str:
    """Seconds: 5.71 s, 85.2 ms, 12.0 us."""
    if number >= 1:
        return f"{number:,.2f} s"
    return f"{1e3 * number:.1f} ms" if number >= 1e-3 else f"{1e6 * number:.1f} us"


def many(number: int, noun: str) -> str:
    """A number with its noun: 1 node, 512 nodes."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
