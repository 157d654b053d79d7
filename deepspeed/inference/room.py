"""Memory that weights are read into.

Used by `weights`. Each tensor that is read has a mapping of its own, which is unmapped with the last reference to it: the allocator would keep
what was freed between tensors that stay, several times the largest. Pages of a mapped file are handed back piece by piece as they
are copied, so that neither counts twice.

Invariant: while a tensor is read, cut and cast, memory holds the result and no more than `PIECE` bytes beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box
from deepspeed.checkpoint.mapped import Mapped
from deepspeed.tiers.buffers import aligned_buffer

PIECE = 2 << 20
"""Bytes that are converted, or copied out of a mapped file, at a time."""
_SMALL = 64 << 10
"""Tensors below this lie where the allocator puts them."""


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, given back for good when it is dropped. In small pages: huge ones were got in 0.3 to 9 s for 645 MB."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _SMALL:
        return torch.empty(tuple(shape), dtype=dtype)
    return aligned_buffer(nbytes, is_huge=False).view(dtype).view(tuple(shape))


def copy_out(whole: Tensor, box: Box | None, dtype: torch.dtype, file: Mapped | None) -> Tensor:
    """A part of a mapped tensor as a contiguous one of `dtype`; the pages of all of it are handed back."""
    made = new_tensor(whole.shape if box is None else box.shape, dtype)
    if box is None and whole.is_contiguous():
        source, target = whole.view(-1), made.view(-1)
        step = PIECE // whole.itemsize
        for start in range(0, source.numel(), step):
            piece = source[start : start + step]
            target[start : start + step].copy_(piece)
            if file is not None:
                file.let_go(piece)
        return made
    _copy_box(whole, box, made)
    if file is not None and whole.is_contiguous():
        file.let_go(whole)
    return made


def _copy_box(whole: Tensor, box: Box | None, made: Tensor) -> None:
    ranges = [((0, size),) for size in whole.shape] if box is None else box.ranges
    for chosen in itertools.product(*(_placed(of_dim) for of_dim in ranges)):
        source, target = whole, made
        for dim, (start, at, numel) in enumerate(chosen):
            source, target = source.narrow(dim, start, numel), target.narrow(dim, at, numel)
        target.copy_(source)


def _placed(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start, position among what is held, count) of each range."""
    found, at = [], 0
    for start, stop in ranges:
        found.append((start, at, stop - start))
        at += stop - start
    return found
