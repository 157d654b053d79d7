"""The backward in two halves: only the gradients of a stage's inputs are waited for by others; weight gradients fill gaps.

Zero Bubble Pipeline Parallelism, arXiv:2401.10241 (H1 and H2: section 2.2), and Pipeline Parallelism with Controllable
Memory, arXiv:2405.15362 (the V: section 4). Where forward, input and weight gradients take equal times T:

             bubble of a rank       micro-batches alive at most
    1F1B     3 (p - 1) T            p
    ZB-H1    (p - 1) T              p
    ZB-H2    0                      2 p - 1
    ZB-V     0                      p, each through two stages of half the size

ZB-H2 and ZB-V have no bubble between a rank's first action and its last; the last ranks begin later and end later, so
that the next step's beginning must not wait for all.
"""

from __future__ import annotations

from deepspeed.parallel.pipeline.actions import Actions, Script, looped, v_shaped
from deepspeed.parallel.pipeline.schedules.one_f_one_b import chunks_in_rounds, round_length


def zb_h1(num_ranks: int, num_micro: int, num_chunks: int = 1) -> Actions:
    """1F1B's memory, a third of its bubble. With several stages per rank, interleaved as in `interleaved`."""
    in_round = round_length("zb-h1", num_ranks, num_micro)
    num_ops = num_chunks * num_micro
    lists = []
    for rank in range(num_ranks):
        warm_up = min((num_chunks - 1) * in_round + num_ranks - 1 - rank, num_ops)
        script = Script(
            range(rank, num_chunks * num_ranks, num_ranks),
            num_micro,
            forwards=chunks_in_rounds(num_chunks, num_micro, in_round),
            backwards=(num_chunks - 1 - chunk for chunk in chunks_in_rounds(num_chunks, num_micro, in_round)),
            weight_lag=rank,
        )
        lists.append(script.say("F", warm_up).say("F I", num_ops - warm_up).say("I", warm_up).complete())
    return Actions(tuple(lists), looped(num_ranks, num_chunks * num_ranks), num_micro, "zb-h1")


def zb_h2(num_ranks: int, num_micro: int) -> Actions:
    """No bubble, for about twice 1F1B's memory: enough forwards first that a rank's first gradient finds it busy."""
    lists = []
    for rank in range(num_ranks):
        warm_up = min(num_micro, 2 * (num_ranks - rank) - 1)
        script = Script([rank], num_micro, weight_lag=2 * rank)
        lists.append(script.say("F0", warm_up).say("I0 F0", num_micro - warm_up).say("I0", warm_up).complete())
    return Actions(tuple(lists), looped(num_ranks, num_ranks), num_micro, "zb-h2")


def zb_v(num_ranks: int, num_micro: int) -> Actions:
    """No bubble at 1F1B's memory: the model goes down the ranks and back up, so that the first rank computes the loss."""
    lists = []
    for rank in range(num_ranks):
        below = num_ranks - rank
        # The list is made for enough micro-batches to fill the pipeline; `Script` leaves out those that do not exist.
        num_full = max(2 * num_ranks - 1, num_micro)
        script = Script([rank, 2 * num_ranks - 1 - rank], num_micro)
        script.say("F0", 2 * below - 1).say("F1 F0", rank).say("F1 I1 W1", below)
        script.say("F0 I0 W0 F1 I1 W1", num_full - num_ranks - below + 1).say("I0 W0 F1 I1 W1", below - 1)
        script.say("I0 I1", rank).say("I0 W0", below).say("W1", rank)
        lists.append(script.complete())
    return Actions(tuple(lists), v_shaped(num_ranks), num_micro, "zb-v")
