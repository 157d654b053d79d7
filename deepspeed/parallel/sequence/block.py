"""Attention of some queries to some keys, with what is needed to join it with attention to others: the log of its sum.

Used by the ring and by FPDT, which see keys block by block. softmax over all keys follows from softmax over blocks:

    out = sum_j exp(lse_j - lse) out_j,    lse = log sum_j exp(lse_j)

and with the joined `out` and `lse` each block's backward is exact by itself. On CPUs a block is torch's fused kernel where
nothing but causal order is masked; elsewhere plain products, a tile of queries at a time, so that no matrix of scores is whole.

All tensors [batch, heads, sequence, width]; keys may have fewer heads, in equal groups. After FlashAttention
(arXiv:2205.14135) and ring attention (arXiv:2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 512
"""Queries per tile of scores."""


class Mask(NamedTuple):
    """Who sees whom in a block: positions in the whole sequence, and documents, of queries and keys.

    documents: [b, queries] and [b, keys], -1 for what sees nothing; None where all is one document. window: how far back a
    query sees. visible: [b, keys], a padding mask.
    """

    query_positions: Tensor
    key_positions: Tensor
    is_causal: bool
    documents: tuple[Tensor, Tensor] | None = None
    window: int | None = None
    visible: Tensor | None = None

    @property
    def is_order_alone(self) -> bool:
        """Whether nothing but causal order is masked."""
        return self.documents is None and self.window is None and self.visible is None

    def of_queries(self, start: int, end: int) -> Tensor | None:
        """[b or 1, 1, queries, keys] for some queries; None where all is seen."""
        behind = self.query_positions[start:end, None] - self.key_positions
        allowed = (behind >= 0)[None, None] if self.is_causal else None
        if self.window is not None:
            near = ((behind < self.window) & (behind > -self.window))[None, None]
            allowed = near if allowed is None else allowed & near
        if self.documents is not None:
            own, keys = self.documents[0][:, start:end], self.documents[1]
            same = ((own[:, :, None] == keys[:, None, :]) & (own >= 0)[:, :, None])[:, None]
            allowed = same if allowed is None else allowed & same
        if self.visible is not None:
            there = self.visible[:, None, None, :].bool()
            allowed = there if allowed is None else allowed & there
        return allowed


def _is_fused(query: Tensor, mask: Mask) -> bool:
    return query.device.type == "cpu" and mask.is_order_alone and query.shape[2] > 1


def _is_aligned(mask: Mask) -> bool:
    """Whether causal order is the lower triangle of a square: the kernel's own meaning of causal."""
    return torch.equal(mask.query_positions, mask.key_positions)


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    size = query.shape[1] // key.shape[1]
    return key if size == 1 else key.repeat_interleave(size, dim=1)


def _summed(grad: Tensor, key: Tensor) -> Tensor:
    size = grad.shape[1] // key.shape[1]
    return grad if size == 1 else grad.unflatten(1, (key.shape[1], size)).sum(2)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask) -> tuple[Tensor, Tensor]:
    """(output, lse [b, h, queries] in fp32 or wider); queries that see nothing have 0 and -inf."""
    key, value = _repeated(key, query), _repeated(value, query)
    if _is_fused(query, mask) and (not mask.is_causal or _is_aligned(mask)):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask.is_causal, scale=scale
        )
        return found[0], found[1]
    outputs, sums = [], []
    for start, end in _tiles(query):
        scores, lse = _scores(query[:, :, start:end], key, scale, mask.of_queries(start, end))
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
        outputs.append((weights @ value.to(weights.dtype)).to(query.dtype))
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of this block, of the joined `output` and `lse` over all blocks."""
    keys, values = _repeated(key, query), _repeated(value, query)
    if _is_fused(query, mask) and (not mask.is_causal or _is_aligned(mask)):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(), query, keys, values, output, lse, 0.0, mask.is_causal, scale=scale
        )
        return found[0], _summed(found[1], key), _summed(found[2], value)
    wide = lse.dtype
    grad_keys, grad_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    grad_queries = []
    for start, end in _tiles(query):
        own, own_grad = query[:, :, start:end], grad[:, :, start:end].to(wide)
        scores, _ = _scores(own, keys, scale, mask.of_queries(start, end))
        weights = torch.exp(scores - lse[:, :, start:end].nan_to_num(neginf=0.0)[..., None])
        inner = (own_grad * output[:, :, start:end].to(wide)).sum(-1, keepdim=True)
        grad_values += weights.transpose(-2, -1) @ own_grad
        grad_scores = weights * (own_grad @ values.to(wide).transpose(-2, -1) - inner) * scale
        grad_queries.append((grad_scores @ keys.to(wide)).to(query.dtype))
        grad_keys += grad_scores.transpose(-2, -1) @ own.to(wide)
    return (
        torch.cat(grad_queries, 2),
        _summed(grad_keys, key).to(key.dtype),
        _summed(grad_values, value).to(value.dtype),
    )


def _tiles(query: Tensor) -> Iterator[tuple[int, int]]:
    return ((start, min(start + TILE, query.shape[2])) for start in range(0, query.shape[2], TILE))


def _scores(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores, torch.logsumexp(scores, dim=-1)


class Joined:
    """Attention over the blocks seen so far."""

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, output: Tensor, lse: Tensor) -> None:
        """One more block."""
        if self.output is None or self.lse is None:
            self.output, self.lse = output.to(lse.dtype), lse
            return
        both = torch.logaddexp(self.lse, lse)
        safe = both.nan_to_num(neginf=0.0)
        self.output = self.output * torch.exp(self.lse - safe)[..., None]
        self.output += output * torch.exp(lse - safe)[..., None]
        self.lse = both
