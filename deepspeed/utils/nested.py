"""Attributes by dotted path."""

from __future__ import annotations

import functools
from typing import Any


def recursive_getattr(root: Any, path: str) -> Any:
    """`root.a.b.c` for the path "a.b.c". Raises AttributeError."""
    return functools.reduce(getattr, path.split("."), root)


def recursive_setattr(root: Any, path: str, value: Any) -> None:
    """Set `root.a.b.c` for the path "a.b.c". Raises AttributeError if a holder is missing."""
    holder, _, name = path.rpartition(".")
    setattr(recursive_getattr(root, holder) if holder else root, name, value)
