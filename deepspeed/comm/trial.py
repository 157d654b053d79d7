"""Which of two exchanges is faster for small messages here and now: tried once, when a group's exchange is chosen.

Called by `comm.choose`, unless `DS_SHARED_MEMORY` says 0 or 1. A few milliseconds of all-reduces in turns; the fastest of each counts,
since what other programs take makes calls slower, never faster. A process tries once for a number of ranks, not for each group.

Invariant: every rank gets the same answer, from every rank's times.
"""

from __future__ import annotations

import functools
import time
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange

NUMEL = 1 << 14
"""64 KiB of fp32: what most small messages of a step are below."""
NUM_ROUNDS = 5


class Verdict(IntEnum):
    """What is known of which is faster."""

    NONE = 0
    SHARED = 1
    GLOO = 2


@functools.lru_cache(maxsize=1)
def verdicts() -> dict[int, Verdict]:
    """What this process's trials found, by number of ranks."""
    return {}


class Times(NamedTuple):
    """Microseconds of the fastest all-reduce of each."""

    first: int
    second: int


def try_both(first: Exchange, second: Exchange) -> Times:
    """This rank's times. Collective over the ranks of both, which are the same."""
    buffer = torch.zeros(NUMEL)
    first_s, second_s = [], []
    for _ in range(NUM_ROUNDS + 1):
        first_s.append(_all_reduced(first, buffer))
        second_s.append(_all_reduced(second, buffer))
    return Times(*(round(1e6 * min(taken[1:])) for taken in (first_s, second_s)))  # the first warms up


def _all_reduced(exchange: Exchange, buffer: Tensor) -> float:
    start_s = time.perf_counter()
    exchange.start_all_reduce(buffer).wait()
    return time.perf_counter() - start_s


def agreed(of_ranks: list[list[int]]) -> Times:
    """What all ranks' times are together: a collective is as slow as its slowest rank."""
    first, second = (max(column) for column in zip(*of_ranks, strict=True))
    return Times(first, second)
