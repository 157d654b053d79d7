"""A module as it was before `init_inference`, to be put back where that fails on any rank.

Taken by the engine once all that can be refused was refused, and dropped once every rank is done. What is left to fail is a value that
cannot be quantized, a file that ends early, memory or a disk that is full.

Invariant: a module that is put back has its own layers, parameters, values, hooks and attributes. It costs the old values' memory beside the
new ones', so where there is little (`has_room`) weights are given back one by one and nothing can be put back; a module on meta has none.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

_CGROUP = Path("/sys/fs/cgroup")


class Before:
    """What `module` is made of now. `is_written`: another rank's values will be written over its own, which are laid aside."""

    def __init__(self, module: nn.Module, is_written: bool = False) -> None:
        self._modules = [(each, type(each), _copied(each.__dict__)) for each in module.modules()]
        tensors: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self._tensors = [(t, t.__class__, t.data, t.grad, t.requires_grad, dict(t.__dict__)) for t in tensors.values()]
        for tensor, *_ in self._tensors if is_written else ():
            tensor.data = tensor.data.clone()
        self._hooks = [(t, hooks, dict(hooks)) for t in tensors.values() if (hooks := t._backward_hooks) is not None]

    def put_back(self) -> None:
        """Have the module be that again."""
        for tensor, its_class, data, grad, requires_grad, attributes in self._tensors:
            tensor.__class__ = its_class
            tensor.data = data
            tensor.grad = None
            tensor.requires_grad = requires_grad
            tensor.grad = grad
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)
            tensor._backward_hooks = None
        for tensor, hooks, held in self._hooks:
            hooks.clear()
            hooks.update(held)
            tensor._backward_hooks = hooks
        for each, kind, (attributes, inside) in self._modules:
            each.__class__ = kind
            each.__dict__.clear()
            each.__dict__.update(attributes)
            for name, held in inside.items():  # the same containers, which handles of hooks know
                attributes[name].clear()
                attributes[name].update(held)


def _copied(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and what is in its dicts and sets."""
    inside = {name: value.copy() for name, value in attributes.items() if isinstance(value, (dict, set))}
    return dict(attributes), inside


def has_room(module: nn.Module) -> bool:
    """Whether old and new values, and as much again, can be in main memory at once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if t.device.type == "cpu"}
    return 3 * sum(t.nbytes for t in tensors.values()) <= _available()


def _available() -> int:
    """Bytes that this process can still have: the machine's, or its container's."""
    found = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        found = min(found, int(limit) - int(used))
    return found
