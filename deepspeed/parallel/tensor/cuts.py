"""Which indices of a dimension each rank holds: interval arithmetic, pure.

Asked by `apply` for every parameter that is cut; the answers go into marks (`mesh.marks`), by which checkpoints know them.

    even       10 over 3                                 0-4  4-7  7-10
    blocks     8 kv heads of 128 over 3                  0-384  384-768  768-1024    (3, 3, 2 heads)
    packed     gate and up, 2 parts of 6 over 2          0-3 6-9     3-6 9-12

Invariant: over all ranks the ranges cover every index once, and a rank's ranges are in order.
"""

from __future__ import annotations

from collections.abc import Sequence

Ranges = tuple[tuple[int, int], ...]


def even(size: int, num_ranks: int, rank: int, grain: int = 1) -> tuple[int, int]:
    """The rank-th of `num_ranks` pieces, multiples of `grain` that differ by one at most; what fills no grain is the last's.

    Where there is not a grain for each rank, it is halved until there is.
    """
    step = grain
    while step > 1 and size < step * num_ranks:
        step //= 2
    units = size // step
    start = sum(_share(units, num_ranks, r) for r in range(rank))
    stop = start + _share(units, num_ranks, rank)
    return start * step, size if rank == num_ranks - 1 else stop * step


def _share(count: int, num_ranks: int, rank: int) -> int:
    return count // num_ranks + (rank < count % num_ranks)


def blocks(size: int, num_blocks: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Whole blocks, of which there are `num_blocks` equal ones."""
    assert size % num_blocks == 0, f"{size} indices are not {num_blocks} equal blocks"
    start, stop = even(num_blocks, num_ranks, rank)
    return start * (size // num_blocks), stop * (size // num_blocks)


def packed(parts: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges inside of parts that lie end to end: `parts[i]` is the (start, stop) in whole indices."""
    return tuple((start, stop) for start, stop in parts if stop > start)


def numel(ranges: Ranges) -> int:
    """How many indices they are."""
    return sum(stop - start for start, stop in ranges)
