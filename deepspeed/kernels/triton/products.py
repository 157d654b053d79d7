"""Products of few rows with a weight of 8 or 4 bits, for GPUs: the weight is read once, as it rests.

Asked by `quant.linear` for what a model does for one token after the other; for more rows the weight is made whole. A program has a
tile of the weight's rows and walks along them by pairs of neighbours, so that two of 4 bits come in one byte: integers become numbers of
x's dtype in registers, as `dequantize` makes them, and meet x there.

Invariant: the answer is that of the dequantized weight, summed in fp32 in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.triton import lists
from deepspeed.kernels.triton.lists import DTYPES, narrow
from deepspeed.kernels.triton.quantize import halves

MAX_ROWS = 16
"""Rows of x, the fewest of a tile that GPUs multiply at once."""
TILE, PAIRS = 32, 32
"""Of the weight: rows of a program, and pairs that it reads of each at a time."""


@triton.jit
def _number(integer, scale, low, symmetric: tl.constexpr, kind: tl.constexpr, widens: tl.constexpr):
    """An integer of the weight as the dequantized weight has it."""
    value = integer.to(tl.float32) * scale
    if not symmetric:
        value = value + low
    value = narrow(value, kind)
    if widens:
        value = value.to(tl.float32)
    return value


@triton.jit
def product_kernel(
    x,  # [num_rows, width]
    values,  # [num_columns, bytes of a row]
    scales,  # [num_columns * groups of a row] fp32
    minima,  # the same, not read where symmetric
    bias,  # [num_columns], not read without has_bias
    out,  # [num_rows, num_columns], written
    num_rows,
    num_columns,
    width,
    group_size,
    num_bits: tl.constexpr,
    symmetric: tl.constexpr,
    has_bias: tl.constexpr,
    kind: tl.constexpr,
    widens: tl.constexpr,
    padded_rows: tl.constexpr,
    tile: tl.constexpr,
    pairs: tl.constexpr,
):
    """One tile of the weight's rows. Widths and groups are even."""
    row = tl.arange(0, padded_rows).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    is_row, is_column = (row < num_rows)[:, None], (column < num_columns)[None, :]
    total = tl.zeros((padded_rows, tile), dtype=tl.float32)
    for start in range(0, width // 2, pairs):
        pair = start + tl.arange(0, pairs).to(tl.int64)
        is_pair = pair < width // 2
        x_at = x + row[:, None] * width + 2 * pair[None, :]
        left = tl.load(x_at, mask=is_row & is_pair[None, :], other=0.0)
        right = tl.load(x_at + 1, mask=is_row & is_pair[None, :], other=0.0)
        if widens:
            left, right = left.to(tl.float32), right.to(tl.float32)
        mask = is_column & is_pair[:, None]
        if num_bits == 4:
            at = values + column[None, :] * (width // 2) + pair[:, None]
            even, odd = halves(tl.load(at, mask=mask, other=0), symmetric)
        else:
            at = values + column[None, :] * width + 2 * pair[:, None]
            even = tl.load(at, mask=mask, other=0).to(tl.int32)
            odd = tl.load(at + 1, mask=mask, other=0).to(tl.int32)
        group = column[None, :] * (width // group_size) + 2 * pair[:, None] // group_size
        scale = tl.load(scales + group, mask=mask, other=0.0)
        low = tl.load(minima + group, mask=mask, other=0.0)
        first = _number(even, scale, low, symmetric, kind, widens)
        second = _number(odd, scale, low, symmetric, kind, widens)
        total += tl.dot(left, first, input_precision="ieee")
        total += tl.dot(right, second, input_precision="ieee")
    if has_bias:
        total += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * num_columns + column[None, :], narrow(total, kind), mask=is_row & is_column)


def quantized_product(x: Tensor, weight: Quantized, num_bits: int, num_rows: int, bias: Tensor | None) -> Tensor | None:
    """x [..., width] of at most MAX_ROWS rows with a weight [num_rows, width]; [..., num_rows] in x's dtype. None: not taken."""
    width = x.shape[-1]
    rows = x.numel() // width
    values, scales, minima = weight
    group_size = values.shape[1] * 8 // num_bits
    if not 0 < rows <= MAX_ROWS or x.dtype not in DTYPES or group_size % 2 or not values.is_contiguous():
        return None
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], num_rows)
    product_kernel[(triton.cdiv(num_rows, TILE),)](
        x, values, scales, scales if minima is None else minima, scales if bias is None else bias, out,
        rows, num_rows, width, group_size, num_bits=num_bits, symmetric=minima is None, has_bias=bias is not None,
        kind=DTYPES[x.dtype], widens=lists.widens(x), padded_rows=MAX_ROWS, tile=TILE, pairs=PAIRS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
