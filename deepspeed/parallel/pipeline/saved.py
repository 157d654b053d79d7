"""How many bytes autograd keeps of a forward: used by `profile` and by the executor where a list is to be made."""

from __future__ import annotations

import torch
from torch import Tensor


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps while it is on, parameters aside and each piece of memory once."""

    def __init__(self) -> None:
        super().__init__(self._note, lambda tensor: tensor)
        self._sizes: dict[int, int] = {}

    def _note(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def nbytes(self) -> int:
        """So far."""
        return sum(self._sizes.values())
