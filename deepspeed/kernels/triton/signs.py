"""One bit per element with error feedback; the format and the oracle are `reference.signs`.

Two launches to compress, because the scale is a norm of everything: the first adds and leaves a sum of squares per
program, the second takes the signs. Their sum is made in double precision on the device; nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.reference.signs import check_signs

BLOCK = 4096
"""Elements per program."""


@triton.jit
def add_and_square_kernel(x, error, sums, numel, block: tl.constexpr):
    """error += x [numel]; sums [num_programs] fp64, the squares of each block."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < numel
    total = tl.load(error + at, mask=here, other=0) + tl.load(x + at, mask=here, other=0)
    tl.store(error + at, total, mask=here)
    wide = total.to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(wide * wide, axis=0))


@triton.jit
def take_signs_kernel(error, bits, scale, numel, num_bytes: tl.constexpr):
    """bits [numel / 8] of error [numel], which keeps the rest; scale [1]."""
    byte = tl.program_id(0).to(tl.int64) * num_bytes + tl.arange(0, num_bytes)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    here = at < numel
    value = tl.load(error + at, mask=here, other=0)
    size = tl.load(scale)
    is_positive = value >= 0
    tl.store(error + at, value - tl.where(is_positive, size, -size), mask=here)
    packed = tl.sum(is_positive.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < numel)


@triton.jit
def add_signs_kernel(bits, into, scale, numel, block: tl.constexpr):
    """into [numel] += scale * sign."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < numel
    packed = tl.load(bits + at // 8, mask=here, other=0).to(tl.int32)
    size = tl.load(scale)
    sign = tl.where(((packed >> (at % 8).to(tl.int32)) & 1) == 1, size, -size)
    tl.store(into + at, tl.load(into + at, mask=here, other=0) + sign, mask=here)


def compress_signs(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.signs.compress_signs`."""
    numel = x.numel()
    check_signs(numel)
    programs = (triton.cdiv(numel, BLOCK),)
    sums = torch.zeros(max(programs[0], 1), dtype=torch.float64, device=x.device)
    bits = torch.empty(numel // 8, dtype=torch.uint8, device=x.device)
    if numel:
        add_and_square_kernel[programs](x.contiguous(), error, sums, numel, block=BLOCK, enable_fp_fusion=False)
    scale = (sums.sum() / max(numel, 1)).sqrt().float()
    if numel:
        take_signs_kernel[programs](error, bits, scale.view(1), numel, num_bytes=BLOCK // 8, enable_fp_fusion=False)
    return bits, scale


def add_signs(bits: Tensor, into: Tensor, scale: Tensor | float) -> None:
    """`reference.signs.add_signs`."""
    if into.numel():
        size = torch.as_tensor(scale, dtype=torch.float32, device=into.device).view(1)
        programs = (triton.cdiv(into.numel(), BLOCK),)
        add_signs_kernel[programs](bits, into, size, into.numel(), block=BLOCK, enable_fp_fusion=False)
