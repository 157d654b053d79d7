"""Which heads a rank has, as ranges."""

from __future__ import annotations

import pytest

from deepspeed.parallel.sequence.heads import Heads, deal, share_heads
from deepspeed.utils.errors import DeepSpeedConfigError


def as_text(heads: Heads) -> str:
    """q0-4 k0-1 | ..., with the own key head of each query head where these are repeated."""
    ranks = []
    for rank in range(heads.num_ranks):
        (a, b), (c, d) = heads.query[rank], heads.key[rank]
        reads = heads.expand(rank)
        ranks.append(f"q{a}-{b} k{c}-{d}" + (f" {''.join(map(str, reads))}" if reads else ""))
    return " | ".join(ranks)


@pytest.mark.parametrize(
    ("query", "key", "ranks", "expected"),
    [
        (8, 8, 2, "q0-4 k0-4 | q4-8 k4-8"),
        (8, 2, 2, "q0-4 k0-1 | q4-8 k1-2"),
        (9, 3, 2, "q0-6 k0-2 | q6-9 k2-3"),
        (7, 7, 3, "q0-3 k0-3 | q3-5 k3-5 | q5-7 k5-7"),
        (8, 2, 4, "q0-2 k0-1 | q2-4 k0-1 | q4-6 k1-2 | q6-8 k1-2"),
        (8, 1, 4, "q0-2 k0-1 | q2-4 k0-1 | q4-6 k0-1 | q6-8 k0-1"),
        (6, 2, 4, "q0-2 k0-1 | q2-4 k0-2 | q4-5 k1-2 | q5-6 k1-2"),
        (10, 2, 3, "q0-4 k0-1 | q4-7 k0-2 011 | q7-10 k1-2"),
    ],
)
def test_heads_are_dealt_with_the_key_heads_they_read(query: int, key: int, ranks: int, expected: str) -> None:
    assert as_text(share_heads(query, key, ranks)) == expected


def test_every_query_head_finds_its_key_head_on_its_rank() -> None:
    for key in range(1, 9):
        for query in range(key, 4 * key + 1, key):
            for ranks in range(1, query + 1):
                heads = share_heads(query, key, ranks)
                for rank in range(ranks):
                    (first, end), (first_key, _) = heads.query[rank], heads.key[rank]
                    reads = heads.expand(rank) or [i // heads.group_size(rank) for i in range(end - first)]
                    assert [i * key // query for i in range(first, end)] == [first_key + own for own in reads]


def test_ranges_cover_and_the_longer_ones_come_first() -> None:
    assert deal(7, 3) == ((0, 3), (3, 5), (5, 7))


def test_fewer_heads_than_ranks_are_refused_by_number() -> None:
    with pytest.raises(DeepSpeedConfigError, match="3 attention heads cannot be split over 4 sequence-parallel ranks"):
        share_heads(3, 3, 4)


def test_query_heads_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(DeepSpeedConfigError, match="5 query heads are not a multiple of 2 key heads"):
        share_heads(5, 2, 2)
