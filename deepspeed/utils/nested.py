"""Attributes by dotted path; tensors in nested containers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any


def recursive_getattr(root: Any, path: str) -> Any:
    """`root.a.b.c` for the path "a.b.c". Raises AttributeError."""
    return functools.reduce(getattr, path.split("."), root)


def recursive_setattr(root: Any, path: str, value: Any) -> None:
    """Set `root.a.b.c` for the path "a.b.c". Raises AttributeError if a holder is missing."""
    holder, _, name = path.rpartition(".")
    setattr(recursive_getattr(root, holder) if holder else root, name, value)


def map_tensors(function: Callable[[Any], Any], item: Any) -> Any:
    """`item` with `function` applied to whatever has a `.to` (tensors, batches of Transformers) in nested containers.

    Lists, tuples and mappings keep their type, and a state dict its `_metadata`; everything else is passed on as it is.
    """
    if callable(getattr(item, "to", None)):
        return function(item)
    if isinstance(item, Mapping):
        mapped = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
        mapped.update({key: map_tensors(function, value) for key, value in item.items()})
        return mapped
    if isinstance(item, (list, tuple)):
        values = [map_tensors(function, value) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """The tensors in nested containers on `device`; of these, where `criterion_func` is given, those it is true for."""
    return map_tensors(lambda t: t.to(device) if criterion_func is None or criterion_func(t) else t, item)


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """Copies of the tensors in nested containers, on `device`, each in memory of its own, as a file should have them.

    A parameter is a view of its bucket, and saving a view saves the bucket. One tensor under two names stays one.
    """
    clones: dict[Any, Any] = {}

    def clone(tensor: Any) -> Any:
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
        if place not in clones:
            clones[place] = tensor.detach().to(device or tensor.device, copy=True)
        return clones[place]

    return map_tensors(clone, item)
