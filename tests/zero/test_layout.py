"""Interval arithmetic of a bucket: properties over random parameter sizes, groups and world sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.zero.layout import ALIGNMENT, BucketLayout, group_neighbours


@st.composite
def layouts(draw: st.DrawFn) -> BucketLayout:
    numels = draw(st.lists(st.integers(0, 300), min_size=1, max_size=8))
    groups = draw(st.lists(st.integers(-1, 2), min_size=len(numels), max_size=len(numels)))
    order = group_neighbours(groups)
    return BucketLayout(
        tuple(numels[i] for i in order), tuple(groups[i] for i in order), draw(st.integers(min_value=1, max_value=7))
    )


@given(layouts())
def test_the_pieces_of_all_ranks_cover_every_parameter_exactly_once(layout: BucketLayout) -> None:
    counts = [[0] * numel for numel in layout.numels]
    for rank in range(layout.world_size):
        for piece in layout.pieces(rank):
            for i in range(piece.in_param, piece.in_param + piece.numel):
                counts[piece.param][i] += 1
    assert all(count == 1 for of_param in counts for count in of_param)


@given(layouts())
def test_pieces_of_a_shard_lie_in_it_one_after_another(layout: BucketLayout) -> None:
    for rank in range(layout.world_size):
        end = 0
        for piece in layout.pieces(rank):
            assert piece.in_shard == end
            assert rank * layout.shard_numel + piece.in_shard == layout.starts[piece.param] + piece.in_param
            end = piece.in_shard + piece.numel
        assert end <= layout.shard_numel


@given(layouts())
def test_runs_are_contiguous_and_cover_the_pieces_of_their_group_and_no_others(layout: BucketLayout) -> None:
    for rank in range(layout.world_size):
        runs = layout.runs(rank)
        assert len({run.group for run in runs}) == len(runs)
        in_runs = {(run.group, i) for run in runs for i in range(run.start, run.stop)}
        in_pieces = {
            (layout.groups[piece.param], i)
            for piece in layout.pieces(rank)
            if layout.groups[piece.param] >= 0
            for i in range(piece.in_shard, piece.in_shard + piece.numel)
        }
        assert in_runs == in_pieces


@given(layouts())
def test_padding_is_at_the_end_aligned_and_less_than_one_unit(layout: BucketLayout) -> None:
    assert layout.shard_numel % ALIGNMENT == 0
    assert layout.padded_numel == layout.shard_numel * layout.world_size
    assert 0 <= layout.padded_numel - layout.numel <= layout.world_size * ALIGNMENT


def test_groups_that_are_not_neighbours_are_refused() -> None:
    with pytest.raises(AssertionError, match="must be neighbours"):
        BucketLayout((1, 1, 1), (0, 1, 0), 1)


def test_sorting_by_group_keeps_the_order_within_a_group() -> None:
    assert group_neighbours([1, -1, 0, 1, 0]) == [1, 2, 4, 0, 3]
