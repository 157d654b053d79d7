"""Attention of one new token over a cache, compiled: the signature of `reference.attention`, at the speed of reading the cache.

    attend = pick("decode_attention", query.device.type)
    out = attend(query, keys, values, scale=dim ** -0.5, ranges=ranges)       # [batch, heads, dim]

Picked by `table` for tensors in main memory. A cache of fp32, bf16, or int8 with a scale per position is read once for all heads
that share it, in place, with any strides (a slice of a preallocated [batch, shared, capacity, dim], or [batch, capacity, shared,
dim] transposed). Making a position int8: `pick("quantize", "cpu")(rows, dim)` of rows [..., dim], whose `scales` are the ones wanted.
What the loops do not take (fp16, head sizes that are no multiple of 16 or above 512, a package built without a compiler) goes to
the reference.

Invariant: the same bits on every instruction set and with any number of threads. Floats agree with the reference to rounding;
with int8, queries and weights are rounded to 15 bits, far finer than what they meet; beside bf16 to 16, and weights to bf16 where the
query is bf16 too, as kernels for that dtype do: divided by the sum of what was rounded, they err no more than torch's own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deepspeed.kernels import native
from deepspeed.kernels.reference import attention as reference

MAX_DIM = 512
"""The head size up to which products of int8 with 15 bits fit in 32."""

_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


def takes(keys: Tensor, values: Tensor) -> bool:
    """Whether the loops read such a cache, and are there."""
    is_read = keys.dtype in _KINDS and keys.shape[-1] % 16 == 0 and keys.shape[-1] <= MAX_DIM
    if not is_read or keys.stride(-1) != 1 or values.stride(-1) != 1:
        return False
    if native.library() is None:
        native.warn_slower("attention over a cache runs on torch's kernels, with more passes over memory")
        return False
    return True


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
    reference.check_attention(query, keys, values, ranges, key_scales, value_scales)
    if not takes(keys, values):
        return reference.decode_attention(
            query, keys, values, scale=scale, ranges=ranges, bias=bias, key_scales=key_scales, value_scales=value_scales
        )
    batch, heads, dim = query.shape
    shared, positions = keys.shape[1:3]
    asked = query.detach().float().contiguous()
    whole = torch.tensor([[0, positions]]).expand(batch, 2) if ranges is None else ranges
    added = None if bias is None else bias.detach().float().expand(batch, heads, positions)
    out = torch.empty(batch, heads, dim)
    library = native.library()
    assert library is not None, "takes() says whether there is a library"
    held = whole.contiguous()
    library.ds_decode_attention(
        _address(asked),
        ctypes.c_float(scale),
        *map(_address, (keys, values, key_scales, value_scales, added, held)),
        _strides(keys, values, key_scales, value_scales, added),
        _address(out),
        _KINDS[keys.dtype],
        _KINDS.get(query.dtype, 1),
        *map(ctypes.c_int64, (batch, shared, heads // shared, dim)),
        torch.get_num_threads(),
    )
    return out.to(query.dtype)


def _strides(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_int64]:
    """Three of each, zeros for what is not there."""
    found = [stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride()[:3])]
    return (ctypes.c_int64 * len(found))(*found)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
