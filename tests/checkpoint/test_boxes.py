"""Boxes: any layout's boxes tile a tensor, and any other layout finds all of its elements in them, once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspeed.checkpoint.boxes import Box, box_of, check_box, common, describe, meeting, tiling_problem

Piece = tuple[Box | None, int, int]


def deal(draw: Any, size: int, num_parts: int) -> list[list[tuple[int, int]]]:
    """Indices of a dim dealt to parts in runs: fused projections give each part several ranges, and some get none."""
    points = sorted(draw(st.sets(st.integers(0, size), max_size=6)) | {0, size})
    parts: list[list[tuple[int, int]]] = [[] for _ in range(num_parts)]
    for start, stop in itertools.pairwise(points):
        parts[draw(st.integers(0, num_parts - 1))].append((start, stop))
    return parts


@st.composite
def layouts(draw: Any, shape: tuple[int, ...]) -> list[Piece]:
    """What the ranks of a job hold of a tensor: cut by tensor parallelism over some dims, then by ZeRO in intervals."""
    boxes: list[dict[int, list[tuple[int, int]]]] = [{}]
    for dim in draw(st.sets(st.integers(0, len(shape) - 1), max_size=2)) if shape else ():
        parts = deal(draw, shape[dim], draw(st.integers(1, 3)))
        boxes = [{**box, dim: part} for box in boxes for part in parts]
    pieces: list[Piece] = []
    for cuts in boxes:
        box = box_of(shape, cuts)
        numel = math.prod(shape) if box is None else box.numel
        points = sorted(draw(st.sets(st.integers(0, numel), max_size=4)) | {0, numel})
        pieces += [(box, start, stop) for start, stop in itertools.pairwise(points)]
    return pieces


def elements(whole: Tensor, box: Box | None) -> Tensor:
    """A box's elements by indexing, the plain way."""
    for dim, ranges in enumerate(box.ranges if box else ()):
        index = torch.tensor([i for start, stop in ranges for i in range(start, stop)], dtype=torch.int64)
        whole = whole.index_select(dim, index)
    return whole.reshape(-1)


SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_every_layout_reads_what_every_other_has_written(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    whole = torch.arange(math.prod(shape)).view(shape)
    stored, wanted = data.draw(layouts(shape)), data.draw(layouts(shape))
    files = [elements(whole, box)[start:stop] for box, start, stop in stored]
    for box, start, stop in wanted:
        got = torch.full((stop - start,), -1)
        times = torch.zeros(stop - start, dtype=torch.int64)
        for piece, values in zip(stored, files, strict=True):
            for at_stored, at_wanted, numel in meeting(piece, (box, start, stop), shape):
                got[at_wanted - start :][:numel] = values[at_stored - piece[1] :][:numel]
                times[at_wanted - start :][:numel] += 1
        assert torch.equal(got, elements(whole, box)[start:stop])
        assert (times == 1).all()


@given(st.data())
@settings(deadline=None)
def test_the_boxes_of_a_layout_tile_the_tensor_and_one_less_does_not(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    boxes = list(dict.fromkeys(box for box, start, stop in data.draw(layouts(shape)) if start < stop))
    assert tiling_problem(boxes, shape) is None or not boxes
    for i in range(len(boxes)):
        assert "elements" in (tiling_problem(boxes[:i] + boxes[i + 1 :], shape) or "")


def dealt(shape: tuple[int, int], tp: int, dp: int, dim: int) -> list[Piece]:
    """tp ranks cut a matrix over `dim`, dp ranks cut each part flat."""
    size, pieces = shape[dim] // tp, []
    for rank in range(tp):
        box = box_of(shape, {dim: [(rank * size, (rank + 1) * size)]})
        numel = math.prod(shape) // tp
        points = [numel * i // dp for i in range(dp + 1)]
        pieces += [(box, a, b) for a, b in itertools.pairwise(points)]
    return pieces


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("into", [(1, 1), (2, 3), (4, 2), (6, 1)])
def test_dp_8_becomes_tp_times_dp(into: tuple[int, int], dim: int) -> None:
    shape = (24, 36)
    before, after = dealt(shape, 1, 8, 0), dealt(shape, *into, dim)
    for new in after:
        found = sum(stretch.numel for old in before for stretch in meeting(old, new, shape))
        assert found == new[2] - new[1]
    found = sum(stretch.numel for old in before for new in after for stretch in meeting(old, new, shape))
    assert found == math.prod(shape)


def test_rows_are_one_stretch_and_columns_one_each_row() -> None:
    rows, columns = box_of((4, 6), {0: [(1, 3)]}), box_of((4, 6), {1: [(0, 2)]})
    assert [tuple(s) for s in common(None, rows, (4, 6))] == [(6, 0, 12)]
    assert [tuple(s) for s in common(None, columns, (4, 6))] == [(0, 0, 2), (6, 2, 2), (12, 4, 2), (18, 6, 2)]
    assert [tuple(s) for s in common(rows, columns, (4, 6))] == [(0, 2, 2), (6, 4, 2)]


def test_a_box_of_everything_is_no_box_and_neighbours_are_joined() -> None:
    assert box_of((4, 2), {0: [(0, 1), (1, 4)]}) is None
    assert box_of((4, 2), {0: [(1, 2), (2, 4)]}) == Box((((1, 4),), ((0, 2),)))


@pytest.mark.parametrize("ranges", [[(0, 5)], [(2, 3), (1, 2)], [(0, 2), (1, 3)]])
def test_ranges_that_cannot_be_are_named(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"the range \d:\d of 4 indices"):
        box_of((4,), {0: ranges})
    with pytest.raises(ValueError):
        check_box(Box((tuple(ranges), ((0, 1),))), (4,))


def test_what_does_not_tile_is_told_with_the_boxes() -> None:
    low, high = box_of((4,), {0: [(0, 3)]}), box_of((4,), {0: [(2, 4)]})
    assert tiling_problem([low, high], (4,)) == "the boxes [0:3] and [2:4] have 1 elements in common"
    assert tiling_problem([low], (4,)) == "the boxes [0:3] have 3 of its 4 elements"
    assert describe(None) == "[whole]"
