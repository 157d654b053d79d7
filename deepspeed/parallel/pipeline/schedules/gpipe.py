"""All forwards, then all backwards: the simplest schedule, with every micro-batch alive at once. arXiv:1811.06965."""

from __future__ import annotations

from deepspeed.parallel.pipeline.actions import Actions, Script, looped


def gpipe(num_ranks: int, num_micro: int) -> Actions:
    """Bubble: (p - 1) / (m + p - 1) of the time; `num_micro` activations alive at every stage."""
    lists = (Script([rank], num_micro).say("F0", num_micro).say("B0", num_micro) for rank in range(num_ranks))
    return Actions(tuple(script.complete() for script in lists), looped(num_ranks, num_ranks), num_micro, "gpipe")
