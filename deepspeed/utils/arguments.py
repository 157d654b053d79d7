"""Numbers on the command line, for argparse's `type`: what is no number, or none that the argument can mean, is told with its rule."""

from __future__ import annotations

import argparse
import math


def whole(text: str) -> int:
    """A whole number, at least 1."""
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return found


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return found
