"""Attributes by dotted path; tensors in nested containers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any


def recursive_getattr(root: Any, path: str) -> Any:
    """`root.a.b.c` for the path "a.b.c". Raises AttributeError."""
    return functools.reduce(getattr, path.split("."), root)


def recursive_setattr(root: Any, path: str, value: Any) -> None:
    """Set `root.a.b.c` for the path "a.b.c". Raises AttributeError if a holder is missing."""
    holder, _, name = path.rpartition(".")
    setattr(recursive_getattr(root, holder) if holder else root, name, value)


def move_to_device(item: Any, device: Any, criterion_func: Any = None) -> Any:
    """The tensors in nested lists, tuples and mappings on `device`; of these, only those for which `criterion_func` is true.

    Containers keep their type; everything else is passed on as it is.
    """
    if hasattr(item, "to") and callable(item.to):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(move_to_device(value, device, criterion_func) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(move_to_device(value, device, criterion_func) for value in item)
    if isinstance(item, Mapping):
        moved = {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
        return moved if type(item) is dict else type(item)(moved)  # type: ignore[call-arg]
    return item
