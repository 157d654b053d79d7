"""Group-wise integer quantisation in plain torch: the formats, and the oracle of every faster implementation.

A tensor is cut into groups of `group_size` consecutive elements in memory order; each group has one scale and, where it
is not symmetric, one minimum. For b bits:

    symmetric     scale = max|x| / (2^(b-1) - 1)      q = round(x / scale)            in [-(2^(b-1) - 1), 2^(b-1) - 1]
    asymmetric    scale = (max x - min x) / (2^b - 1)  q = round((x - min) / scale)    in [0, 2^b - 1]

`round` is to the nearest, ties to even; the arithmetic is fp32 whatever the input is. A group whose scale is 0 has q = 0
and comes back as 0 or its minimum. int8 is one element a byte (signed, or unsigned where asymmetric). int4 is two: the
element of even position in the low four bits, each stored plus 8 where symmetric.

Invariant: for finite input each element comes back within half a scale, and a rounding of fp32.
NaN and infinity make their group's scale not finite, which is how callers find them: `has_bad_groups`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError


class Quantized(NamedTuple):
    """`values` [num_groups, bytes per group] int8 or uint8; `scales` and `minima` [num_groups] fp32."""

    values: Tensor
    scales: Tensor
    minima: Tensor | None = None
    """None where the quantisation is symmetric."""


def check_groups(numel: int, group_size: int, num_bits: int) -> None:
    """Raise DeepSpeedError unless `numel` elements can be cut into groups of this size and number of bits."""
    if num_bits not in (4, 8):
        raise DeepSpeedError(f"num_bits = {num_bits}: elements are quantised to 4 or 8 bits.")
    if group_size <= 0 or numel % group_size:
        raise DeepSpeedError(
            f"group_size = {group_size} does not divide {numel} elements.\n  Choose a divisor, or pad the tensor."
        )
    if num_bits == 4 and group_size % 2:
        raise DeepSpeedError(f"group_size = {group_size} is odd: two elements of 4 bits share a byte.")


def quantize(x: Tensor, group_size: int, num_bits: int = 8, *, symmetric: bool = True) -> Quantized:
    """Quantise a floating-point tensor group by group. Raises DeepSpeedError for sizes that do not go."""
    check_groups(x.numel(), group_size, num_bits)
    groups = x.reshape(-1, group_size).float()
    if symmetric:
        top = 2 ** (num_bits - 1) - 1
        scales = _largest(groups) / top
        q = _divide(groups, scales).clamp_(-top, top)
        return Quantized(q.to(torch.int8) if num_bits == 8 else pack_nibbles(q.add_(8)), scales)
    top = 2**num_bits - 1
    minima, maxima = (groups.amin(1), groups.amax(1)) if groups.numel() else (groups.sum(1), groups.sum(1))
    scales = (maxima - minima) / top
    q = _divide(groups - minima[:, None], scales).clamp_(0, top)
    return Quantized(q.to(torch.uint8) if num_bits == 8 else pack_nibbles(q), scales, minima)


def dequantize(quantized: Quantized, num_bits: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The elements again, [num_groups * group_size], computed in fp32 and rounded once to `dtype`."""
    values, scales, minima = quantized
    q = values.float() if num_bits == 8 else unpack_nibbles(values).float()
    if minima is None:
        q = q if num_bits == 8 else q - 8
        return (q * scales[:, None]).to(dtype).view(-1)
    return (q * scales[:, None] + minima[:, None]).to(dtype).view(-1)


def has_bad_groups(quantized: Quantized) -> Tensor:
    """[] bool: whether a group held NaN or infinity. Stays on the device."""
    return ~torch.isfinite(quantized.scales).all()


def pack_nibbles(q: Tensor) -> Tensor:
    """[..., n] of 0 to 15 to [..., n / 2] bytes, the even position in the low four bits."""
    pairs = q.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: [..., n] bytes to [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _largest(groups: Tensor) -> Tensor:
    return groups.abs().amax(1) if groups.numel() else groups.sum(1)


def _divide(groups: Tensor, scales: Tensor) -> Tensor:
    """round(groups / scales), 0 where a scale is 0 (and where it is not finite, so that no cast is undefined)."""
    q = (groups / scales[:, None]).round_()
    return torch.where((scales > 0)[:, None] & torch.isfinite(q), q, 0.0)
