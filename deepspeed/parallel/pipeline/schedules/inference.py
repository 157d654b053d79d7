"""Forwards alone, for evaluation."""

from __future__ import annotations

from deepspeed.parallel.pipeline.actions import Actions, Script, looped


def inference(num_ranks: int, num_micro: int, rank_of: tuple[int, ...] = ()) -> Actions:
    """Every micro-batch through every stage, in order. `rank_of` by stage, default one stage per rank."""
    rank_of = rank_of or looped(num_ranks, num_ranks)
    lists = []
    for rank in range(num_ranks):
        stages = [stage for stage, owner in enumerate(rank_of) if owner == rank]
        phrase = " ".join(f"F{chunk}" for chunk in range(len(stages)))
        lists.append(Script(stages, num_micro).say(phrase, num_micro).complete())
    return Actions(tuple(lists), rank_of, num_micro, "inference")
