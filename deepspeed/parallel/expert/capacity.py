"""How many tokens an expert takes at most: arithmetic, without torch.

Used by `gate`. A capacity is per source rank: each rank fills its own share of every expert.

After GShard (arXiv:2006.16668), section 2.2, with the contract's factors.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from deepspeed.utils.errors import DeepSpeedError


def capacity_of(num_tokens: int, num_experts: int, factor: float, minimum: int = 0) -> int:
    """Tokens that each of `num_experts` takes of one rank's `num_tokens`: their even share times `factor`, rounded up, and
    not below `minimum`."""
    return max(math.ceil(num_tokens / num_experts * factor), int(minimum))


def check_factors(**factors: float) -> None:
    """Refuse factors that leave experts without tokens. Raises DeepSpeedError, naming the argument."""
    for name, value in factors.items():
        if not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
            raise DeepSpeedError(
                f"{name} = {value!r}: experts would take no token, or any number.\n"
                "  Give a number above 0 (1.0: each expert takes its even share), or drop_tokens=False for no limit."
            )


def check_minimum(min_capacity: float) -> None:
    """Refuse what is no number of tokens. Raises DeepSpeedError."""
    is_number = isinstance(min_capacity, Real) and not isinstance(min_capacity, bool)
    if not is_number or not 0 <= min_capacity < math.inf:
        raise DeepSpeedError(
            f"min_capacity = {min_capacity!r} is no number of tokens.\n"
            "  Give how many tokens of a rank an expert takes at least, 0 for what capacity_factor leaves."
        )


def check_k(k: int, num_experts: int) -> None:
    """Refuse choices that a token cannot make. Raises DeepSpeedError."""
    if not isinstance(k, Integral) or isinstance(k, bool):
        raise DeepSpeedError(
            f"k = {k!r} is a {type(k).__name__}, not an integer.\n  Give how many experts a token visits."
        )
    if not 1 <= k <= num_experts:
        raise DeepSpeedError(f"k = {k} of {num_experts} experts.\n  A token can go to 1 to {num_experts} of them.")


def num_local(num_experts: int, ep_size: int) -> int:
    """Experts on each of `ep_size` ranks. Raises DeepSpeedError where they do not divide."""
    for name, value in (("num_experts", num_experts), ("ep_size", ep_size)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise DeepSpeedError(
                f"{name} = {value!r} is a {type(value).__name__}, not an integer.\n"
                "  Layers with different numbers of experts are different MoE layers, each with its own num_experts."
            )
    if num_experts < 1 or ep_size < 1 or num_experts % ep_size:
        raise DeepSpeedError(
            f"num_experts = {num_experts} should be divisible by ep_size = {ep_size}: every rank holds equally many.\n"
            + (
                f"  Choose ep_size among {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}."
                if num_experts > 0
                else "  A layer has at least one expert."
            )
        )
    return num_experts // ep_size


def rows_on_the_wire(num_experts: int, k: int, ep_size: int) -> tuple[float, float]:
    """Rows that a token costs each way under uniform routing to k different experts: (one per destination rank, one per
    expert elsewhere). With 8 experts, top-2 and 2 ranks: (0.786, 1.0)."""
    local = num_experts // ep_size
    untouched = math.comb(num_experts - local, k) / math.comb(num_experts, k)
    return (ep_size - 1) * (1 - untouched), k * (ep_size - 1) / ep_size


def check_width(hidden_size: Any) -> None:
    """Raise DeepSpeedError where that is no width of tokens."""
    if not isinstance(hidden_size, Integral) or hidden_size < 1:
        raise DeepSpeedError(f"hidden_size = {hidden_size!r} is no width of tokens.\n  Give an integer of at least 1.")
