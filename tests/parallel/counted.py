"""Counts of tensors, exact on a busy machine: what a forward keeps for its backward, and the largest tensor that any operation makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_nbytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """The bytes of all memory that `forward` keeps for its backward, each once, without the parameters'. Runs the backward."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other memory gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    found = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return found


class Largest(TorchDispatchMode):
    """`numel`: elements of the largest tensor that an operation gave, forward or backward; of those of a last dimension `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.numel = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what comes out."""
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.shape[-1:] == (self.width,)
        ]
        self.numel = max(self.numel, *sizes, 0)
        return out
