"""Graphs of the simulated device: while one is captured nothing is computed in place, and a replay is the operations again.

As on CUDA, a number of Python that went into an operation stays what it was at the capture, and to ask for a value is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


class SIMGraph:
    """Operations in order, each with its arguments and the tensors that its results are put into (None: it writes in place)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any] | None]] = []

    @torch.no_grad()
    def replay(self) -> None:
        """Do them."""
        for function, args, kwargs, results in self.calls:
            found = tree_leaves(function(*args, **kwargs))
            for new, kept in zip(found, results, strict=True) if results is not None else ():
                if isinstance(kept, Tensor):
                    kept.copy_(new)


class graph(TorchDispatchMode):  # noqa: N801 (torch's name)
    """Puts the operations of the block into a graph."""

    def __init__(self, into: SIMGraph, pool: Any = None, stream: Any = None) -> None:
        super().__init__()
        self._into = into

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _ASKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
            raise RuntimeError(f"a copy between host and device was captured: {function}")
        arguments = function._schema.arguments
        written = [i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]
        if written:
            self._into.calls.append((function, args, kwargs, None))
            place = written[0]
            into = args[place] if place < len(args) else kwargs[arguments[place].name]
            return into if function._schema.returns else None
        found = function(*args, **kwargs)
        if tensors and not any(each.alias_info for each in function._schema.returns):
            self._into.calls.append((function, args, kwargs, tree_leaves(found)))
        return found
