"""Attention of one new token over a cache of fp32, bf16, fp16 or int8, for GPUs; see `kernels.reference.attention`.

Two kernels. The first: one program per sequence, head of the cache and chunk of positions, for all query heads that share it: the chunk is
read once, and leaves its largest score, the sum of its weights and its sum of values. The second puts the chunks of a query head
together. So a long cache of one sequence fills a GPU too. After arXiv:2205.14135 (sums by parts).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.reference.attention import check_attention

CHUNK, TILE = 256, 32
"""Positions of a program, and of one step of it."""


@triton.jit
def chunk_kernel(
    query,  # [batch, shared * num_heads, dim] contiguous
    keys, values,  # [batch, shared, positions, dim], dim contiguous
    key_scales, value_scales,  # [batch, shared, positions] contiguous, or anything
    bias,  # [batch, shared * num_heads, positions] contiguous fp32, or anything
    ranges,  # [batch, 2] int64
    tops, sums,  # [batch, shared, num_heads, chunks], written
    parts,  # [batch, shared, num_heads, chunks, dim], written
    scale, shared, positions, dim, num_chunks,
    key_of_batch, key_of_head, key_of_row, value_of_batch, value_of_head, value_of_row,  # strides in elements
    num_heads: tl.constexpr, padded_heads: tl.constexpr, padded_dim: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr,
    is_int8: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    """One chunk of one head of the cache."""
    at = tl.program_id(0).to(tl.int64)
    batch = at // shared
    head = at % shared
    part = tl.program_id(1)
    first = tl.load(ranges + 2 * batch) + part * chunk
    stop = tl.minimum(tl.load(ranges + 2 * batch + 1), first + chunk)
    h = tl.arange(0, padded_heads)
    d = tl.arange(0, padded_dim)
    is_head = h < num_heads
    is_dim = d < dim
    q_at = query + (at * num_heads + h)[:, None] * dim + d[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & is_dim[None, :], other=0.0).to(tl.float32) * scale
    top = tl.full((padded_heads,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((padded_heads,), dtype=tl.float32)
    mixed = tl.zeros((padded_heads, padded_dim), dtype=tl.float32)
    for start in range(0, chunk, tile):
        p = first + start + tl.arange(0, tile).to(tl.int64)
        is_seen = p < stop
        both = is_seen[:, None] & is_dim[None, :]
        k_at = keys + batch * key_of_batch + head * key_of_head + p[:, None] * key_of_row + d[None, :]
        k = tl.load(k_at, mask=both, other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2)
        if is_int8:
            scores *= tl.load(key_scales + at * positions + p, mask=is_seen, other=0.0)[None, :]
        if has_bias:
            b_at = bias + (at * num_heads + h)[:, None] * positions + p[None, :]
            scores += tl.load(b_at, mask=is_head[:, None] & is_seen[None, :], other=0.0)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(tl.where(top == float("-inf"), float("-inf"), top - base))
        total = total * kept + tl.sum(weights, axis=1)
        v_at = values + batch * value_of_batch + head * value_of_head + p[:, None] * value_of_row + d[None, :]
        v = tl.load(v_at, mask=both, other=0.0).to(tl.float32)
        if is_int8:
            v *= tl.load(value_scales + at * positions + p, mask=is_seen, other=0.0)[:, None]
        mixed = mixed * kept[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
        top = higher
    into = (at * num_heads + h) * num_chunks + part
    tl.store(tops + into, top, mask=is_head)
    tl.store(sums + into, total, mask=is_head)
    tl.store(parts + into[:, None] * dim + d[None, :], mixed, mask=is_head[:, None] & is_dim[None, :])


@triton.jit
def combine_kernel(
    tops,
    sums,  # [heads, chunks]
    parts,  # [heads, chunks, dim]
    out,  # [heads, dim], written
    dim,
    num_chunks,
    padded_dim: tl.constexpr,
):
    """All chunks of one query head."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, padded_dim)
    is_dim = d < dim
    top = tl.full((), float("-inf"), dtype=tl.float32)
    for c in range(num_chunks):
        top = tl.maximum(top, tl.load(tops + at * num_chunks + c))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((), dtype=tl.float32)
    mixed = tl.zeros((padded_dim,), dtype=tl.float32)
    for c in range(num_chunks):
        weight = tl.exp(tl.load(tops + at * num_chunks + c) - base)
        total += weight * tl.load(sums + at * num_chunks + c)
        mixed += weight * tl.load(parts + (at * num_chunks + c) * dim + d, mask=is_dim, other=0.0)
    mixed = tl.where(total > 0, mixed / tl.where(total > 0, total, 1.0), tl.where(total == 0, 0.0, total))
    tl.store(out + at * dim + d, mixed.to(out.dtype.element_ty), mask=is_dim)


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
    """`reference.attention.decode_attention`."""
    check_attention(query, keys, values, ranges, key_scales, value_scales)
    batch, heads, dim = query.shape
    shared, positions = keys.shape[1:3]
    keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in (keys, values))
    device = query.device
    seen = torch.tensor([[0, positions]]).expand(batch, 2) if ranges is None else ranges
    longest = int((seen[:, 1] - seen[:, 0]).max()) if batch else 0
    num_chunks = max(triton.cdiv(longest, CHUNK), 1)
    added = None if bias is None else bias.float().expand(batch, heads, positions).contiguous()
    scales = [None if part is None else part.float().contiguous() for part in (key_scales, value_scales)]
    tops, sums = (torch.empty(batch * heads, num_chunks, device=device) for _ in range(2))
    parts = torch.empty(batch * heads, num_chunks, dim, device=device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    padded_dim = triton.next_power_of_2(dim)
    each = heads // shared
    if out.numel():
        chunk_kernel[(batch * shared, num_chunks)](
            query.contiguous(), keys, values, *(_or(part, query) for part in (*scales, added)), seen.contiguous().to(device),
            tops, sums, parts, scale, shared, positions, dim, num_chunks, *keys.stride()[:3], *values.stride()[:3], each,
            triton.next_power_of_2(each), padded_dim, CHUNK, TILE, keys.dtype is torch.int8, added is not None,
        )  # fmt: skip
        combine_kernel[(batch * heads,)](tops, sums, parts, out, dim, num_chunks, padded_dim)
    return out


def _or(tensor: Tensor | None, other: Tensor) -> Any:
    """An address for a kernel that does not read it."""
    return other if tensor is None else tensor
