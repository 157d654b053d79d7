"""Which heads each rank attends with: pure arithmetic.

Read by the exchange, by the layers on top of it and by tests. With `h` query heads, `kv` key heads (grouped-query attention:
query head i reads key head i * kv // h) and P ranks:

    kv divides by P           rank r has kv/P key heads and their h/P query heads
    kv >= P, uneven           key heads are dealt as evenly as possible, each with all of its query heads
    kv < P                    query heads are dealt as evenly as possible; a key head goes to every rank that needs it

Where a rank's query heads do not read its key heads in equal groups (5 query heads, the first two of one key head), the
rank repeats key heads so that there is one for each query head: `expand`.

Invariant: the query ranges of the ranks partition the heads, in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.utils.errors import DeepSpeedConfigError

Range = tuple[int, int]


def deal(count: int, num_ranks: int) -> tuple[Range, ...]:
    """`count` things in `num_ranks` consecutive ranges, the longer ones first."""
    least, more = divmod(count, num_ranks)
    starts = [rank * least + min(rank, more) for rank in range(num_ranks + 1)]
    return tuple((starts[rank], starts[rank + 1]) for rank in range(num_ranks))


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of every rank: ranges of query heads, ranges of key (and value) heads."""

    num_query: int
    num_key: int
    query: tuple[Range, ...]
    key: tuple[Range, ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks share the heads."""
        return len(self.query)

    def expand(self, rank: int) -> tuple[int, ...] | None:
        """The own key head that each own query head reads, where these are no equal groups; else None."""
        (first, end), (first_key, end_key) = self.query[rank], self.key[rank]
        reads = tuple(i * self.num_key // self.num_query - first_key for i in range(first, end))
        num_key = end_key - first_key
        size = len(reads) // num_key
        is_even = reads == tuple(i for i in range(num_key) for _ in range(size))
        return None if is_even else reads

    def group_size(self, rank: int) -> int:
        """Query heads per key head of this rank, after `expand`."""
        (first, end), (first_key, end_key) = self.query[rank], self.key[rank]
        return 1 if self.expand(rank) is not None else (end - first) // (end_key - first_key)


def share_heads(num_query: int, num_key: int, num_ranks: int) -> Heads:
    """Deal the heads to the ranks. Raises DeepSpeedConfigError where there are fewer query heads than ranks, or query heads
    are no multiple of key heads."""
    if num_query % num_key:
        raise DeepSpeedConfigError(
            f"{num_query} query heads are not a multiple of {num_key} key heads: attention cannot be grouped."
        )
    if num_query < num_ranks:
        raise DeepSpeedConfigError(
            f"{num_query} attention heads cannot be split over {num_ranks} sequence-parallel ranks.\n"
            f"  Choose a sequence parallel size of at most {num_query}."
        )
    if num_key >= num_ranks:
        size = num_query // num_key
        key = deal(num_key, num_ranks)
        return Heads(num_query, num_key, tuple((a * size, b * size) for a, b in key), key)
    query = deal(num_query, num_ranks)
    key = tuple((a * num_key // num_query, (b - 1) * num_key // num_query + 1) for a, b in query)
    return Heads(num_query, num_key, query, key)
