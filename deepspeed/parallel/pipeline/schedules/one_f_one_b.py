"""One forward, one backward, so that few micro-batches are alive at once; interleaved with several stages per rank.

1F1B: PipeDream-Flush, arXiv:2006.09503. Interleaving: arXiv:2104.04473, section 2.2; micro-batches in rounds, with the
rounds' length as in Llama 3 (arXiv:2407.21783, section 3.3.2), so that their number need not be a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.parallel.pipeline.actions import Actions, Script, looped
from deepspeed.utils.errors import DeepSpeedError


def one_f_one_b(num_ranks: int, num_micro: int) -> Actions:
    """Bubble: (p - 1) / (m + p - 1), as GPipe; at most p - s activations alive at stage s."""
    lists = []
    for rank in range(num_ranks):
        warm_up = min(num_micro, num_ranks - rank)
        script = Script([rank], num_micro)
        lists.append(script.say("F0", warm_up).say("B0 F0", num_micro - warm_up).say("B0", warm_up).complete())
    return Actions(tuple(lists), looped(num_ranks, num_ranks), num_micro, "1f1b")


def interleaved(num_ranks: int, num_micro: int, num_chunks: int = 2) -> Actions:
    """Bubble: (p - 1) / (v m + p - 1) for v stages per rank, bought with v times the sends.

    Raises DeepSpeedError where the micro-batches cannot be cut into equal rounds.
    """
    in_round = round_length("interleaved", num_ranks, num_micro)
    num_ops = num_chunks * num_micro
    lists = []
    for rank in range(num_ranks):
        warm_up = min((num_chunks - 1) * in_round + 2 * (num_ranks - 1 - rank), num_ops)
        script = Script(
            range(rank, num_chunks * num_ranks, num_ranks),
            num_micro,
            forwards=chunks_in_rounds(num_chunks, num_micro, in_round),
            backwards=(num_chunks - 1 - chunk for chunk in chunks_in_rounds(num_chunks, num_micro, in_round)),
        )
        lists.append(script.say("F", warm_up).say("F B", num_ops - warm_up).say("B", warm_up).complete())
    return Actions(tuple(lists), looped(num_ranks, num_chunks * num_ranks), num_micro, "interleaved")


def round_length(name: str, num_ranks: int, num_micro: int) -> int:
    """Micro-batches that go through one chunk before the next chunk's turn. Raises DeepSpeedError unless rounds are equal."""
    num_rounds = max(1, num_micro // num_ranks)
    if num_micro % num_rounds:
        raise DeepSpeedError(
            f"{name}: {num_micro} micro-batches on {num_ranks} ranks are {num_rounds} rounds, which does not divide.\n"
            f"  Choose a multiple of {num_ranks} micro-batches, or fewer than {2 * num_ranks}."
        )
    return num_micro // num_rounds


def chunks_in_rounds(num_chunks: int, num_micro: int, in_round: int) -> Iterator[int]:
    """The chunk of each of a rank's forwards: a round through chunk 0, the same round through chunk 1, ..., the next round."""
    return (op // in_round % num_chunks for op in range(num_chunks * num_micro))
