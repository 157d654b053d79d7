"""DualPipeV: DualPipe (DeepSeek-V3, arXiv:2412.19437, section 3.2.1) cut in half, without a second copy of the parameters.

Rank r has stages r and 2p - 1 - r. In the middle a forward of one stage stands beside a backward of the other, so that
the communication of one can hide behind the computation of the other.
"""

from __future__ import annotations

from deepspeed.parallel.pipeline.actions import Action, Actions, Script, v_shaped
from deepspeed.utils.errors import DeepSpeedError


def dual_pipe_v(num_ranks: int, num_micro: int) -> Actions:
    """Raises DeepSpeedError for fewer micro-batches than stages."""
    if num_micro < 2 * num_ranks:
        raise DeepSpeedError(
            f"DualPipeV needs at least as many micro-batches as stages: {num_micro} < 2 * {num_ranks} ranks.\n"
            "  Raise gradient_accumulation_steps, or use 1f1b."
        )
    return Actions(
        tuple(_list_of(rank, num_ranks, num_micro) for rank in range(num_ranks)),
        v_shaped(num_ranks),
        num_micro,
        "dualpipe-v",
    )


def _list_of(rank: int, num_ranks: int, num_micro: int) -> tuple[Action, ...]:
    below = num_ranks - rank - 1
    script = Script([rank, 2 * num_ranks - 1 - rank], num_micro)
    script.say("F0", 2 * below).say("F0 F1", rank + 1).say("I1 W F1", below)
    script.say("F0 B1 F1 B0", num_micro - 2 * num_ranks + rank + 1).say("B1 F1 B0", below)
    # The last backwards are cut in two on every rank, half way; which half comes first alternates from rank to rank.
    whole, half = divmod(rank + 1, 2)
    script.say("B1 B0", whole)
    if half:
        script.say("B1 I0", 1)
    script.say("I1 I0", rank + 1 - whole - half)
    return script.say("W I0", below).say("W", rank + 1).complete()
