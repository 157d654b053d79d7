"""Boxes of whole tensors: the arithmetic that lets any layout of ranks load what any other wrote.

Pure: no torch, no communication. Used by saving (which box does this rank hold of which whole tensor), by the manifest
(do the boxes tile it) and by loading (which stored elements lie in the box that is wanted, and where).

A box is a product of index lists, one per dim, each a list of ranges in order. What is stored or wanted of it is an
interval of its elements, row-major. Tensor parallelism cuts rows or columns; fused q, k, v rows are several ranges:

    whole [6, 4], rows 0:1 and 4:6                  the box's elements      0  1  2  3 |  4 .. 11
    o o o o                                         are the whole's         0  1  2  3 | 16 .. 23
    . . . .
    . . . .
    . . . .
    o o o o
    o o o o

Two intervals of equal boxes meet in an interval. Those of different boxes meet in rows: the boxes' common indices, cut
into stretches that are contiguous in both.

Invariant: a box's ranges are sorted, disjoint and not empty, and neighbours are joined, so equal boxes compare equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Range = tuple[int, int]
"""Indices [start, stop)."""


@dataclass(frozen=True, slots=True)
class Box:
    """`ranges[d]` are the indices held of dim d of a whole tensor. Make one with `box_of`."""

    ranges: tuple[tuple[Range, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Indices held of each dim."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def numel(self) -> int:
        """Elements held."""
        return math.prod(self.shape)


def box_of(whole: Sequence[int], cuts: Mapping[int, Sequence[Range]]) -> Box | None:
    """The box of a whole tensor's shape in which each dim is cut to ranges; None where that is all of it.

    Raises ValueError, naming the range, for ranges that are out of order, overlap, or leave the tensor.
    """
    ranges = [cuts.get(dim, [(0, size)]) for dim, size in enumerate(whole)]
    for of_dim, size in zip(ranges, whole, strict=True):
        _check_order([r for r in of_dim if r[0] < r[1]], size)
    joined = tuple(tuple(_joined(of_dim)) for of_dim in ranges)
    return None if joined == _everything(whole).ranges else Box(joined)


def _everything(whole: Sequence[int]) -> Box:
    return Box(tuple(((0, size),) if size else () for size in whole))


def check_box(box: Box, whole: Sequence[int]) -> None:
    """Raise ValueError unless a box lies in a tensor of this shape and is written as `box_of` writes it."""
    if len(box.ranges) != len(whole) or any(tuple(_joined(list(r))) != r for r in box.ranges):
        raise ValueError(f"{box.ranges} is no box of a tensor of shape {list(whole)}")
    for ranges, size in zip(box.ranges, whole, strict=True):
        _check_order(ranges, size)


def _check_order(ranges: Sequence[Range], size: int) -> None:
    last = 0
    for start, stop in ranges:
        if not last <= start < stop <= size:
            raise ValueError(f"the range {start}:{stop} of {size} indices, after {last}")
        last = stop


def _joined(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return found


class Stretch(NamedTuple):
    """`numel` elements that follow each other in both of two boxes, at these positions of their elements."""

    at_first: int
    at_second: int
    numel: int


def common(first: Box | None, second: Box | None, whole: Sequence[int]) -> Iterator[Stretch]:
    """The elements that two boxes of one tensor share, in row-major order; None is the whole tensor."""
    if first == second:
        numel = first.numel if first is not None else math.prod(whole)
        if numel:
            yield Stretch(0, 0, numel)
        return
    mine, theirs = first or _everything(whole), second or _everything(whole)
    by_dim = [list(_common_of_dim(a, b)) for a, b in zip(mine.ranges, theirs.ranges, strict=True)]
    strides = _strides(mine.shape), _strides(theirs.shape)
    num_rows = _first_inner_dim(by_dim, mine.shape, theirs.shape)
    inner = math.prod(mine.shape[num_rows:])
    # The last dim that is cut gives stretches, those before it single rows.
    rows = [[(a + i, b + i) for a, b, n in of_dim for i in range(n)] for of_dim in by_dim[: max(0, num_rows - 1)]]
    runs = by_dim[num_rows - 1] if num_rows else [(0, 0, 1)]
    for chosen in itertools.product(*rows):
        start_a = sum(a * stride for (a, _), stride in zip(chosen, strides[0], strict=False))
        start_b = sum(b * stride for (_, b), stride in zip(chosen, strides[1], strict=False))
        for a, b, n in runs:
            if n * inner:
                yield Stretch(start_a + a * inner, start_b + b * inner, n * inner)


def _common_of_dim(first: Sequence[Range], second: Sequence[Range]) -> Iterator[tuple[int, int, int]]:
    """(position in the first, in the second, count) of index ranges that two lists share."""
    at_first = 0
    for start, stop in first:
        at_second = 0
        for low, high in second:
            begin, end = max(start, low), min(stop, high)
            if begin < end:
                yield at_first + begin - start, at_second + begin - low, end - begin
            at_second += high - low
        at_first += stop - start


def _first_inner_dim(by_dim: Sequence[Sequence[object]], first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading dims that have to be walked: behind them, both boxes hold the same indices in one run."""
    dim = len(by_dim)
    while dim and len(by_dim[dim - 1]) == 1 and by_dim[dim - 1][0] == (0, 0, first[dim - 1]) and (
        first[dim - 1] == second[dim - 1]
    ):  # fmt: skip
        dim -= 1
    return dim


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def meeting(
    stored: tuple[Box | None, int, int], wanted: tuple[Box | None, int, int], whole: Sequence[int]
) -> Iterator[Stretch]:
    """Where two intervals meet, each (box, start, stop) in its box's elements; positions are those in the boxes."""
    (first, low_a, high_a), (second, low_b, high_b) = stored, wanted
    for at_a, at_b, numel in common(first, second, whole):
        skip = max(0, low_a - at_a, low_b - at_b)
        end = min(numel, high_a - at_a, high_b - at_b)
        if skip < end:
            yield Stretch(at_a + skip, at_b + skip, end - skip)


def num_common(first: Box | None, second: Box | None, whole: Sequence[int]) -> int:
    """How many elements two boxes share."""
    pairs = zip((first or _everything(whole)).ranges, (second or _everything(whole)).ranges, strict=True)
    return math.prod(sum(numel for _, _, numel in _common_of_dim(a, b)) for a, b in pairs)


def tiling_problem(boxes: Sequence[Box | None], whole: Sequence[int]) -> str | None:
    """What is wrong with different boxes that should tile a tensor; None if nothing. Compares every pair."""
    total = math.prod(whole)
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            twice = num_common(first, second, whole)
            if twice:
                return f"the boxes {describe(first)} and {describe(second)} have {twice} elements in common"
    held = sum(total if box is None else box.numel for box in boxes)
    if held != total:
        return f"the boxes {', '.join(map(describe, boxes))} have {held} of its {total} elements"
    return None


def describe(box: Box | None) -> str:
    """As people write it: [0:2, 4:6; 0:8]."""
    if box is None:
        return "[whole]"
    return f"[{'; '.join(', '.join(f'{start}:{stop}' for start, stop in ranges) for ranges in box.ranges)}]"
