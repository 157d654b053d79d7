"""Attention of one new token over a cache, in plain torch: the fallback everywhere and the oracle of the compiled form.

Picked by `table` as "decode_attention". Everything is made in fp32, whatever the cache holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    ranges: Tensor | None = None,
    bias: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query keys^T + bias) values, over the positions that `ranges` names; [batch, heads, dim] in query's dtype.

    query: [batch, heads, dim], any floating dtype.
    keys, values: [batch, shared, positions, dim], fp32, bf16, fp16 or int8; `shared` divides heads, and query head h reads
        number h // (heads // shared). May be views of a larger cache.
    ranges: [batch, 2] int64 on the CPU, the first position and the one after the last; None: all of them. For padding on
        the left, windows, and sequences of different lengths.
    bias: [batch, heads, positions] or what broadcasts to it, -inf for a position that is not seen; None: nothing is added.
    key_scales, value_scales: [batch, shared, positions] fp32, with int8: what `quantize` gives for groups of dim.

    Where nothing is seen the answer is 0. Raises DeepSpeedError for shapes and dtypes that do not go together.
    """
    check_attention(query, keys, values, ranges, key_scales, value_scales)
    batch, heads, dim = query.shape
    shared, positions = keys.shape[1:3]
    k, v = (_whole(*pair) for pair in ((keys, key_scales), (values, value_scales)))
    scores = torch.einsum("bshd,bspd->bshp", query.float().view(batch, shared, -1, dim) * scale, k)
    if bias is not None:
        scores = scores + bias.float().expand(batch, heads, positions).reshape(scores.shape)
    if ranges is not None:
        at = torch.arange(positions)
        seen = (at >= ranges[:, :1].cpu()) & (at < ranges[:, 1:].cpu())
        scores = scores.masked_fill(~seen.to(scores.device)[:, None, None], -torch.inf)
    weights = torch.where(scores.amax(-1, keepdim=True) == -torch.inf, 0.0, scores.softmax(-1))
    return torch.einsum("bshp,bspd->bshd", weights, v).reshape(batch, heads, dim).to(query.dtype)


def check_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ranges: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Raise DeepSpeedError, with the shapes, where the arguments of `decode_attention` do not go together."""
    batch, heads, dim = query.shape
    fits = keys.shape == values.shape and keys.dtype == values.dtype and keys.shape[0] == batch and keys.shape[3] == dim
    if not fits or heads % keys.shape[1]:
        raise DeepSpeedError(
            f"query {list(query.shape)} does not go with keys {list(keys.shape)} {keys.dtype} and values {list(values.shape)} "
            f"{values.dtype}.\n  Give [batch, heads, dim] and twice [batch, shared, positions, dim], where shared divides heads."
        )
    if ranges is not None:
        if ranges.shape != (batch, 2) or ranges.dtype is not torch.int64:
            raise DeepSpeedError(f"ranges are {list(ranges.shape)} {ranges.dtype}.\n  Give [{batch}, 2] int64.")
        if int(ranges.min()) < 0 or int(ranges.max()) > keys.shape[2]:
            raise DeepSpeedError(
                f"ranges {ranges.tolist()} reach out of a cache of {keys.shape[2]} positions.\n  Give 0 <= first <= last <= positions."
            )
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (scales is not None) != (keys.dtype is torch.int8) or (
            scales is not None and scales.shape != keys.shape[:3]
        ):
            got = None if scales is None else list(scales.shape)
            raise DeepSpeedError(
                f"{name} = {got} with keys {list(keys.shape)} {keys.dtype}.\n  int8 has one per position, others none."
            )


def _whole(cache: Tensor, scales: Tensor | None) -> Tensor:
    return cache.float() if scales is None else cache.float() * scales.unsqueeze(-1)
