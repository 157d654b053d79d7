"""Sums of ranks' messages in plain torch: in the order of the ranks, in fp32 or what is wider, divided, and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 18
"""Elements added up at a time: 1 MB of fp32 stays in cache between the passes."""


def add_up(parts: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> None:
    """Sum two or more `parts` [n] of one dtype in order, divide, and write or add into `out` [n], which may be one of them."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = torch.empty(min(out.numel(), BLOCK_NUMEL), dtype=wide, device=out.device)
    for target, *pieces in zip(out.split(BLOCK_NUMEL), *(part.split(BLOCK_NUMEL) for part in parts), strict=True):
        _add_up_block(total[: target.numel()], pieces, target, divide_by, accumulate)


def _add_up_block(total: Tensor, parts: Sequence[Tensor], out: Tensor, divide_by: float, accumulate: bool) -> None:
    if total.dtype == parts[0].dtype:
        torch.add(parts[0], parts[1], out=total)
    else:
        total.copy_(parts[0]).add_(parts[1])
    for part in parts[2:]:
        total.add_(part)
    if accumulate or divide_by == 1:
        deliver(total, out, divide_by, accumulate)
    else:
        torch.div(total, divide_by, out=out)


def deliver(value: Tensor, out: Tensor, divide_by: float, accumulate: bool) -> None:
    """Write or add value / divide_by into `out`. `value` may be overwritten, and may be `out` itself to divide it."""
    if divide_by != 1:
        value.div_(divide_by)
    if accumulate:
        out.add_(value)
    elif value.data_ptr() != out.data_ptr():
        out.copy_(value)
