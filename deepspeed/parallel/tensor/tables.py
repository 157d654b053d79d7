"""Embeddings that scripts cut by hand, and the small modules beside them: names of `deepspeed.module_inject.layers`.

Invariant: as in `by_hand`, layers are those that `initialize` makes. Names and arguments are the public contract of the original.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.tensor.by_hand import _ranks, _take
from deepspeed.parallel.tensor.layers import Part, VocabEmbedding, WidthEmbedding, turn
from deepspeed.utils.errors import DeepSpeedConfigError


def _own(layer: Any, module: nn.Embedding, mp_group: Any, dim: int, tied: nn.Module | None, name: str | None) -> None:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise DeepSpeedConfigError(
            f"{type(layer).__name__}: {type(module).__name__} is no nn.Embedding without max_norm."
        )
    ranks = _ranks(mp_group)
    layer.padding_idx = module.padding_idx
    if tied is None:
        lengths = _take(layer, module, dim, ranks)
    else:
        lengths = tied.__dict__["tensor_part"].lengths
        layer.weight = tied.weight
    layer.name = name
    turn(layer, type(layer), Part(ranks=ranks, lengths=lengths))


class VocabParallelEmbedding(VocabEmbedding):
    """An embedding cut over its words: ids -> [.., width] whole. tied_vocab_parallel_linear: the head that shares its weight."""

    def __init__(
        self,
        module: nn.Embedding,
        mp_group: Any = None,
        *,
        tied_vocab_parallel_linear: nn.Module | None = None,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(module.num_embeddings, module.embedding_dim, device="meta")
        _own(self, module, mp_group, 0, tied_vocab_parallel_linear, name)


class HiddenParallelEmbedding(WidthEmbedding):
    """An embedding cut over its width: ids -> [.., width] whole. tied_row_parallel_linear: the head that shares its weight."""

    def __init__(
        self,
        module: nn.Embedding,
        mp_group: Any = None,
        *,
        tied_row_parallel_linear: nn.Module | None = None,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(module.num_embeddings, module.embedding_dim, device="meta")
        _own(self, module, mp_group, 1, tied_row_parallel_linear, name)


class EmbeddingLayer(nn.Module):
    """A table of `weight`, or of zeros of `weight_shape`."""

    def __init__(
        self, weight_shape: Any = None, dtype: torch.dtype = torch.half, weight: Any = None, bias: Any = None
    ) -> None:
        super().__init__()
        self.weight = _given(weight, weight_shape, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[..] -> [.., width]."""
        return F.embedding(ids, self.weight)


class OPTEmbedding(EmbeddingLayer):
    """OPT's learned positions, of which the first two stand for nothing."""

    offset = 2

    def __init__(self, weight_shape: Any = None, weight: Any = None, bias: Any = None) -> None:
        super().__init__(weight_shape, torch.float32, weight)

    def forward(self, attention_mask: Tensor, past_key_values_length: int = 0, position_ids: Any = None) -> Tensor:
        """attention_mask: [batch, tokens so far] -> [batch, tokens after the first `past_key_values_length`, width]."""
        if position_ids is None:
            mask = attention_mask.long()
            position_ids = (mask.cumsum(1) * mask - 1)[:, past_key_values_length:]
        return F.embedding(position_ids + self.offset, self.weight)


class Normalize(nn.Module):
    """A layer norm of `weight` and `bias`, or of `dim` ones and zeros."""

    def __init__(
        self,
        dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        eps: float = 1e-5,
        weight: Any = None,
        bias: Any = None,
    ) -> None:
        super().__init__()
        shape = None if dim is None else (dim,)
        self.weight = _given(weight, shape, dtype, fill=1.0)
        self.bias = _given(bias, tuple(self.weight.shape), dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., dim] -> [.., dim]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _given(value: Any, shape: Any, dtype: torch.dtype, fill: float = 0.0) -> nn.Parameter:
    if value is None and shape is None:
        raise DeepSpeedConfigError("a table or a norm needs its weight or its shape.")
    made = torch.full(tuple(shape), fill, dtype=dtype) if value is None else value
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=made.is_floating_point())
