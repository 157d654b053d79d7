"""Cuts of layers into stages: they cover, and no cut has a cheaper costliest stage."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.parallel.pipeline.partition import balanced, uniform
from deepspeed.utils.errors import DeepSpeedError


def _sums(costs: list[int], bounds: list[int]) -> list[int]:
    return [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_no_cut_has_a_cheaper_costliest_stage_nor_a_more_even_one(costs: list[int], num_stages: int) -> None:
    bounds = balanced(costs, num_stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert bounds == sorted(bounds)
    if len(costs) <= num_stages:
        assert bounds == uniform(len(costs), num_stages)
        return
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    best = min(
        (max(sums), sum(x * x for x in sums))
        for inner in cuts
        if (sums := _sums(costs, [0, *inner, len(costs)])) is not None
    )
    found = _sums(costs, bounds)
    assert (max(found), sum(x * x for x in found)) == best
    assert all(a < b for a, b in itertools.pairwise(bounds))


@given(st.integers(0, 50), st.integers(1, 12))
def test_uniform_counts_differ_by_one_at_most_and_the_first_stages_have_more(num_layers: int, num_stages: int) -> None:
    counts = [b - a for a, b in itertools.pairwise(uniform(num_layers, num_stages))]
    assert sum(counts) == num_layers
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


def test_costs_that_are_no_costs_are_refused_by_layer() -> None:
    with pytest.raises(DeepSpeedError, match="the cost of layer 1 is -2"):
        balanced([1, -2, 3], 2)
    with pytest.raises(DeepSpeedError, match="the cost of layer 2 is nan"):
        balanced([1, 2, float("nan")], 2)
