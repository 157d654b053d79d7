"""Routing of tokens that have shapes alone: every expert gets as many, and nothing travels.

Used by `dispatch`, for predictions of memory (`memory.experts`), which run a model on fake tensors: no router has chosen anything
there, and no other rank is there. What a rank would get from the others is as much as it would send them.

Source of the rows per rank: `capacity.rows_on_the_wire`, for choices of different experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepspeed.parallel.expert.place import ExpertPlace


def shares(number: int, num_experts: int) -> list[int]:
    """`number` choices over the experts."""
    return [number // num_experts + (expert < number % num_experts) for expert in range(num_experts)]


def lines(num_tokens: int, num_choices: int, place: ExpertPlace) -> list[list[int]]:
    """For each rank what `dispatch` says to it: the layer, rows, and choices of each of its experts."""
    each, here = shares(num_choices, place.num_experts), place.num_here
    k = max(1, round(num_choices / max(1, num_tokens)))
    missed = math.comb(place.num_experts - here, k) / math.comb(place.num_experts, k)
    rows = round(num_tokens * (1 - missed))
    own: Sequence[list[int]] = [each[r * here : (r + 1) * here] for r in range(place.size)]
    return [[place.number, rows, *counts] for counts in own]
