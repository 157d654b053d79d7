"""Rows of a matrix that are not zero, with their numbers: `deepspeed.runtime.sparse_tensor.SparseTensor`.

For scripts that handle gradients of embeddings by themselves; the engine sends blocks instead (`comm.sparse`).
"""

from __future__ import annotations

import torch
from torch import Tensor


class SparseTensor:
    """The rows of `dense_tensor` that have an element other than zero. A torch sparse tensor keeps the rows it lists."""

    def __init__(self, dense_tensor: Tensor | None = None) -> None:
        self.orig_dense_tensor = dense_tensor
        self.dtype = None if dense_tensor is None else dense_tensor.dtype
        self.is_sparse = dense_tensor is not None and dense_tensor.is_sparse
        if dense_tensor is None:
            return
        if dense_tensor.is_sparse:
            dense_tensor = dense_tensor.coalesce()
            self.indices, self.values = dense_tensor.indices().flatten(), dense_tensor.values()
        else:
            self.indices = (dense_tensor != 0).flatten(1).any(1).nonzero().flatten()
            self.values = dense_tensor[self.indices]
        self.dense_size = list(dense_tensor.size())

    @staticmethod
    def type() -> str:
        """The class's name, as the original spells it."""
        return "deepspeed.SparseTensor"

    def to_coo_tensor(self) -> Tensor:
        """As torch's own sparse tensor."""
        return torch.sparse_coo_tensor(self.indices.unsqueeze(0), self.values, self.dense_size, check_invariants=False)

    def to_dense(self) -> Tensor:
        """Whole; rows that are listed twice are added up."""
        dense = self.values.new_zeros(self.dense_size)
        return dense.index_add_(0, self.indices, self.values)

    def sparse_size(self) -> tuple[int, int]:
        """(elements held, elements of the whole)."""
        dense = 1
        for size in self.dense_size:
            dense *= size
        return self.indices.numel() + self.values.numel(), dense

    def add(self, b: SparseTensor) -> None:
        """List b's rows too. Raises ValueError for another size."""
        if self.dense_size != b.dense_size:
            raise ValueError(f"SparseTensor.add: sizes differ, {self.dense_size} and {b.dense_size}.")
        self.indices = torch.cat([self.indices, b.indices])
        self.values = torch.cat([self.values, b.values])

    def __str__(self) -> str:
        held, dense = self.sparse_size()
        factor = f"{dense / held:.1f}" if held else "-"
        return f"DeepSpeed.SparseTensor(indices_size={self.indices.size()}, values_size={self.values.size()}, dense_size={self.dense_size}, reduction_factor={factor})"
