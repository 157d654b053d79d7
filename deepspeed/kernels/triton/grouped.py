"""Rows in groups, each group times a matrix of its own, forward and backward, for GPUs; see `kernels.grouped`.

Two kernels. Products with matrices: one program per tile of rows of one group and tile of columns; which tiles there are
follows from the counts, which the host has anyway, so that no program is launched for nothing. Weight gradients: one
program per group and tile of its matrix, over the group's rows; a group without rows writes zeros.

Any strides, widths and counts; sums in fp32, fp32 inputs without TF32. After MegaBlocks (arXiv:2211.15841).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.triton.lists import widens

ROWS, INNER = 64, 32
"""Of a tile: rows of a group, and how much of a sum is read at a time."""
COLUMNS = 64


@triton.jit
def multiply_kernel(
    rows,  # [n, inner]
    weight,  # [groups, inner, columns]
    out,  # [n, columns], written
    tiles,  # [num_tiles, 3] int64: group, first row, rows
    inner,
    columns,
    row_stride,
    row_step,
    group_stride,
    inner_stride,
    column_stride,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
    block: tl.constexpr,
    widens: tl.constexpr,
):
    """One tile of one group's result."""
    tile = tl.program_id(0)
    group = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 1)
    many = tl.load(tiles + 3 * tile + 2)
    row = tl.arange(0, num_rows).to(tl.int64)
    column = (tl.program_id(1) * num_columns + tl.arange(0, num_columns)).to(tl.int64)
    total = tl.zeros((num_rows, num_columns), dtype=tl.float32)
    for start in range(0, inner, block):
        at = start + tl.arange(0, block).to(tl.int64)
        left_at = rows + (first + row)[:, None] * row_stride + at[None, :] * row_step
        left = tl.load(left_at, mask=(row < many)[:, None] & (at < inner)[None, :], other=0.0)
        right_at = weight + group * group_stride + at[:, None] * inner_stride + column[None, :] * column_stride
        right = tl.load(right_at, mask=(at < inner)[:, None] & (column < columns)[None, :], other=0.0)
        if widens:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    into = out + (first + row)[:, None] * columns + column[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=(row < many)[:, None] & (column < columns)[None, :])


@triton.jit
def weight_kernel(
    rows,  # [n, inner]
    gradient,  # [n, columns]
    out,  # [groups, inner, columns], written
    starts,  # [groups + 1] int64, a group's first row
    inner,
    columns,
    row_stride,
    row_step,
    gradient_stride,
    gradient_step,
    group_stride,
    inner_stride,
    column_stride,
    num_inner: tl.constexpr,
    num_columns: tl.constexpr,
    block: tl.constexpr,
    widens: tl.constexpr,
):
    """One tile of one group's gradient: rows, transposed, times what came back."""
    group = tl.program_id(0).to(tl.int64)
    at = (tl.program_id(1) * num_inner + tl.arange(0, num_inner)).to(tl.int64)
    column = (tl.program_id(2) * num_columns + tl.arange(0, num_columns)).to(tl.int64)
    first = tl.load(starts + group)
    stop = tl.load(starts + group + 1)
    total = tl.zeros((num_inner, num_columns), dtype=tl.float32)
    for start in range(first, stop, block):
        row = start + tl.arange(0, block).to(tl.int64)
        left_at = rows + row[None, :] * row_stride + at[:, None] * row_step
        left = tl.load(left_at, mask=(at < inner)[:, None] & (row < stop)[None, :], other=0.0)
        right_at = gradient + row[:, None] * gradient_stride + column[None, :] * gradient_step
        right = tl.load(right_at, mask=(row < stop)[:, None] & (column < columns)[None, :], other=0.0)
        if widens:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    into = out + group * group_stride + at[:, None] * inner_stride + column[None, :] * column_stride
    tl.store(into, total.to(out.dtype.element_ty), mask=(at < inner)[:, None] & (column < columns)[None, :])


def multiply(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """rows [n, in], `counts[g]` for group g in order, times weight [groups, in, out] of any strides; [n, out]."""
    out = rows.new_empty(len(rows), weight.shape[2])
    tiles = []
    first = 0
    for group, count in enumerate(counts):
        tiles += [(group, first + at, min(ROWS, count - at)) for at in range(0, count, ROWS)]
        first += count
    if tiles and out.numel():
        grid = (len(tiles), triton.cdiv(weight.shape[2], COLUMNS))
        table = torch.tensor(tiles, dtype=torch.int64, device=rows.device)
        multiply_kernel[grid](
            rows, weight, out, table, weight.shape[1], weight.shape[2], *rows.stride(), *weight.stride(), ROWS, COLUMNS, INNER,
            widens(rows),
        )  # fmt: skip
    return out


def of_weights(rows: Tensor, gradient: Tensor, counts: Sequence[int], out: Tensor) -> Tensor:
    """The gradient of a weight [groups, in, out], written into `out`, of any strides."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    table = torch.tensor(starts, dtype=torch.int64, device=rows.device)
    grid = (len(counts), triton.cdiv(out.shape[1], ROWS), triton.cdiv(out.shape[2], COLUMNS))
    if out.numel():
        weight_kernel[grid](
            rows, gradient, out, table, out.shape[1], out.shape[2], *rows.stride(), *gradient.stride(), *out.stride(),
            ROWS, COLUMNS, INNER, widens(rows),
        )  # fmt: skip
    return out


class Grouped(torch.autograd.Function):
    """`multiply`, and both gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
        """See multiply."""
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return multiply(rows, weight, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The same product with transposed matrices; and the matrices' own."""
        rows, weight = ctx.saved_tensors
        of_rows = multiply(gradients[0], weight.transpose(1, 2), ctx.counts) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None, None
        return of_rows, of_weights(rows, gradients[0], ctx.counts, torch.empty_like(weight)), None


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """See `kernels.grouped.Product`."""
    result: Tensor = Grouped.apply(rows, weight, list(counts))
    return result
