"""Group-wise int8 and int4, both ways, one pass over memory; the formats and the oracle are `reference.quantize`.

Equal to the reference bit for bit: divisions round as IEEE says (`div_rn`), and a sum with 1.5 * 2^23 rounds to the
nearest, ties to even, whatever rounding instruction a target has; products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.reference.quantize import Quantized, check_groups
from deepspeed.kernels.triton.lists import DTYPES, narrow


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_grid(x, low, scale, bottom, top):
    """round((x - low) / scale) within [bottom, top]; 0 where the scale is 0 or not finite."""
    is_good = (scale > 0) & (scale < float("inf"))
    q = _round(tl.div_rn(x - low, tl.where(is_good, scale, 1.0)))
    return tl.where(is_good, tl.minimum(tl.maximum(q, bottom), top), 0.0)


@triton.jit
def quantize_kernel(
    x,  # [num_groups, group_size], floating point
    values,  # [num_groups, bytes per group] uint8 or int8, written
    scales,  # [num_groups] fp32, written
    minima,  # [num_groups] fp32, written unless symmetric
    group_size,
    num_bits: tl.constexpr,
    symmetric: tl.constexpr,
    half_block: tl.constexpr,
):
    """One group: `half_block` pairs of neighbours, so that two of 4 bits meet in one program."""
    group = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, half_block)
    has_even = 2 * pair < group_size
    has_odd = 2 * pair + 1 < group_size
    at = x + group * group_size + 2 * pair
    even = tl.load(at, mask=has_even, other=0).to(tl.float32)
    odd = tl.load(at + 1, mask=has_odd, other=0).to(tl.float32)
    # A NaN must reach the scale, and maxima of a GPU drop it.
    is_nan = tl.max(tl.where((even != even) | (odd != odd), 1, 0), axis=0) > 0
    top: tl.constexpr = 2 ** (num_bits - 1) - 1 if symmetric else 2**num_bits - 1
    bottom: tl.constexpr = -top if symmetric else 0
    if symmetric:
        largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=0)
        scale = tl.div_rn(largest, top * 1.0)
        low = largest * 0.0
    else:
        inf = float("inf")
        low = tl.min(tl.minimum(tl.where(has_even, even, inf), tl.where(has_odd, odd, inf)), axis=0)
        high = tl.max(tl.maximum(tl.where(has_even, even, -inf), tl.where(has_odd, odd, -inf)), axis=0)
        scale = tl.div_rn(high - low, top * 1.0)
        tl.store(minima + group, tl.where(is_nan, float("nan"), low))
    scale = tl.where(is_nan, float("nan"), scale)
    tl.store(scales + group, scale)
    shift = tl.where(low == low, low, 0.0) if not symmetric else 0.0
    first = _to_grid(even, shift, scale, bottom * 1.0, top * 1.0).to(tl.int32)
    second = _to_grid(odd, shift, scale, bottom * 1.0, top * 1.0).to(tl.int32)
    if num_bits == 4:
        if symmetric:
            first += 8
            second += 8
        tl.store(values + group * (group_size // 2) + pair, (first | (second << 4)).to(tl.uint8), mask=has_odd)
    else:
        kind: tl.constexpr = tl.int8 if symmetric else tl.uint8
        to = values + group * group_size + 2 * pair
        tl.store(to, first.to(kind), mask=has_even)
        tl.store(to + 1, second.to(kind), mask=has_odd)


@triton.jit
def halves(packed, symmetric: tl.constexpr):
    """The two integers of 4 bits in each byte: the one at the even place, the one at the odd."""
    packed = packed.to(tl.int32)
    even = packed & 15
    odd = (packed >> 4) & 15
    if symmetric:
        even -= 8
        odd -= 8
    return even, odd


@triton.jit
def dequantize_kernel(
    values,  # [num_groups, bytes per group]
    scales,  # [num_groups] fp32
    minima,  # [num_groups] fp32, not read where symmetric
    out,  # [num_groups * group_size], written
    group_size,
    num_bits: tl.constexpr,
    symmetric: tl.constexpr,
    out_type: tl.constexpr,
    half_block: tl.constexpr,
):
    """One group."""
    group = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, half_block)
    has_even = 2 * pair < group_size
    has_odd = 2 * pair + 1 < group_size
    if num_bits == 4:
        even, odd = halves(tl.load(values + group * (group_size // 2) + pair, mask=has_odd, other=0), symmetric)
    else:
        at = values + group * group_size + 2 * pair
        even = tl.load(at, mask=has_even, other=0).to(tl.int32)
        odd = tl.load(at + 1, mask=has_odd, other=0).to(tl.int32)
    scale = tl.load(scales + group)
    first = even.to(tl.float32) * scale
    second = odd.to(tl.float32) * scale
    if not symmetric:
        low = tl.load(minima + group)
        first = first + low
        second = second + low
    to = out + group * group_size + 2 * pair
    tl.store(to, narrow(first, out_type), mask=has_even)
    tl.store(to + 1, narrow(second, out_type), mask=has_odd)


def quantize(x: Tensor, group_size: int, num_bits: int = 8, *, symmetric: bool = True) -> Quantized:
    """`reference.quantize.quantize` in one launch."""
    check_groups(x.numel(), group_size, num_bits)
    x = x.contiguous()
    num_groups = x.numel() // group_size
    width = group_size * num_bits // 8
    kind = torch.int8 if symmetric and num_bits == 8 else torch.uint8
    values = torch.empty(num_groups, width, dtype=kind, device=x.device)
    scales = torch.empty(num_groups, device=x.device)
    minima = None if symmetric else torch.empty_like(scales)
    if num_groups:
        quantize_kernel[(num_groups,)](
            x, values, scales, scales if minima is None else minima, group_size,
            num_bits=num_bits, symmetric=symmetric, half_block=_half_block(group_size), enable_fp_fusion=False,
        )  # fmt: skip
    return Quantized(values, scales, minima)


def dequantize(quantized: Quantized, num_bits: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.quantize.dequantize` in one launch."""
    values, scales, minima = quantized
    num_groups, width = values.shape
    group_size = width * 8 // num_bits
    out = torch.empty(num_groups * group_size, dtype=dtype, device=values.device)
    if num_groups:
        dequantize_kernel[(num_groups,)](
            values, scales, scales if minima is None else minima, out, group_size,
            num_bits=num_bits, symmetric=minima is None, out_type=DTYPES[dtype], half_block=_half_block(group_size),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _half_block(group_size: int) -> int:
    return triton.next_power_of_2(max((group_size + 1) // 2, 1))
