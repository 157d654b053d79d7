"""The learning-rate schedules as functions of the step `t` = last_batch_iteration, -1 before the first step.

Pure. `optim.schedules` turns them into objects. Each gives a factor, which the caller lays between a minimum and a
maximum or multiplies by a learning rate.

Invariant: these formulas are a published contract, oddities included. The two known ones: with a minimum of 0 the first
*two* steps of a warm-up have learning rate 0 (t = -1, and t = 0 where ln 1 = 0), and a warm-up is never shorter than
two steps.

LRRangeTest and OneCycle after L. N. Smith, arXiv:1506.01186 and arXiv:1803.09820.
"""

from __future__ import annotations

import math


def range_test_factor(t: int, step_size: int, rate: float, is_staircase: bool) -> float:
    """1 + rate * (t+1)/step_size, the quotient floored for a staircase. Multiplies the minimum."""
    interval = (t + 1) / step_size
    return 1 + rate * (math.floor(interval) if is_staircase else interval)


def cycle_factor(t: int, first: int, second: int, first_stairs: int = 0, second_stairs: int = 0) -> float:
    """From 0 to 1 over the `first` steps of a cycle and back over the `second`, in stairs where a count is given."""
    total = first + second
    position = 1 + (t + 1) / total
    position -= math.floor(position)
    ratio = first / total
    if position <= ratio:
        return _stairs(position / ratio, first_stairs)
    return _stairs((position - 1) / (ratio - 1), second_stairs)


def _stairs(scale: float, count: int) -> float:
    return math.floor(scale * count) / count if count > 0 else scale


def cycle_decay(t: int, total: int, rate: float, step_size: int) -> float:
    """rate * d / step_size, d the steps after the cycle of `total`; 0 where either is 0 or the cycle still runs."""
    return rate * max(0, t - total + 1) / step_size if step_size else 0.0


def warmup_steps(num_steps: int) -> int:
    """The length of a warm-up: at least 2, since ln 1 = 0 divides."""
    return max(2, num_steps)


def warmup_factor(t: int, num_steps: int, kind: str) -> float:
    """From 0 to 1 over max(2, num_steps) steps: ln(t+1)/ln(n) for "log", t/n for "linear"; 0 before the first step."""
    n = warmup_steps(num_steps)
    if t < 0:
        return 0.0
    if t >= n:
        return 1.0
    return math.log(t + 1) / math.log(n) if kind == "log" else t / n


def warmup_decay_factor(t: int, num_steps: int, total_num_steps: int, kind: str) -> float:
    """`warmup_factor`, then linearly from 1 to 0 at `total_num_steps`."""
    n = warmup_steps(num_steps)
    if t < n:
        return warmup_factor(t, num_steps, kind)
    return max(0.0, (total_num_steps - t) / max(1, total_num_steps - n))


def warmup_cosine_factor(
    t: int, num_steps: int, total_num_steps: int, kind: str, warmup_min_ratio: float, cos_min_ratio: float
) -> float:
    """From `warmup_min_ratio` up to 1, then half a cosine down to `cos_min_ratio`; 0 before the first step."""
    n = warmup_steps(num_steps)
    if t < 0:
        return 0.0
    if t < n:
        return warmup_min_ratio + (1 - warmup_min_ratio) * warmup_factor(t, num_steps, kind)
    progress = min(1.0, (t - n + 1) / max(1, total_num_steps - n))
    return max(0.0, cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
