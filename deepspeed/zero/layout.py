"""Interval arithmetic of a bucket: which elements of the flat space belong to which parameter and which rank.

Pure: no torch, no communication. Used by buckets, the optimizer, gathered access, and later by checkpoints and the
memory estimator.

A bucket lays its parameters end to end and pads once, at the end, to a multiple of `world_size * ALIGNMENT` elements.
Rank r owns the slice [r*S, (r+1)*S); parameter i covers the interval [starts[i], starts[i] + numels[i]).

         p0        p1            p2     pad
    |---------|-----------|------------|..|     flat space, world_size * S elements
    |    rank 0    |    rank 1    |  rank 2 |

Parameters of one optimizer group stand next to each other, so a rank's slice meets each group in at most one
contiguous *run*: the tensor an optimizer steps.

Invariant: the pieces of all ranks cover every parameter exactly once (property-tested).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGNMENT = 64
"""Elements to which a shard is padded: 256 bytes of fp32, enough for vector loads and for 4-byte NCCL starts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one shard: `numel` elements, positions relative to each."""

    param: int
    """Index of the parameter in its bucket."""
    in_param: int
    """First element, counted in the flattened parameter."""
    in_shard: int
    """First element, counted in the shard."""
    numel: int


@dataclass(frozen=True, slots=True)
class RunSpan:
    """The contiguous part of a shard whose parameters belong to one optimizer group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class BucketLayout:
    """Where the parameters of one bucket lie. `groups[i]` is parameter i's optimizer group, -1 for none."""

    numels: tuple[int, ...]
    groups: tuple[int, ...]
    world_size: int

    def __post_init__(self) -> None:
        assert len(self.numels) == len(self.groups), "one group per parameter"
        changes = [key for key, _ in itertools.groupby(self.groups)]
        assert len(changes) == len(set(changes)), f"parameters of one group must be neighbours, got {self.groups}"

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First element of each parameter in the flat space."""
        return tuple(itertools.accumulate(self.numels, initial=0))[:-1]

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(self.numels)

    @cached_property
    def shard_numel(self) -> int:
        """Elements of one rank's slice, padding included; the flat space has at least one element of padding."""
        unit = self.world_size * ALIGNMENT
        return -(-(self.numel + 1) // unit) * ALIGNMENT

    @cached_property
    def padded_numel(self) -> int:
        """Elements of the flat space."""
        return self.shard_numel * self.world_size

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The pieces of parameters in `rank`'s slice, in order; parameters without elements have none."""
        low, high = rank * self.shard_numel, (rank + 1) * self.shard_numel
        return tuple(
            Piece(i, max(start, low) - start, max(start, low) - low, min(start + numel, high) - max(start, low))
            for i, (start, numel) in enumerate(zip(self.starts, self.numels, strict=True))
            if max(start, low) < min(start + numel, high)
        )

    def runs(self, rank: int) -> tuple[RunSpan, ...]:
        """One span per optimizer group met by `rank`'s slice; parameters without a group have none."""
        by_group = itertools.groupby(self.pieces(rank), key=lambda piece: self.groups[piece.param])
        spans = []
        for group, members in by_group:
            pieces = list(members)
            if group >= 0:
                spans.append(RunSpan(group, pieces[0].in_shard, pieces[-1].in_shard + pieces[-1].numel))
        return tuple(spans)


def group_neighbours(groups: Sequence[int]) -> list[int]:
    """A stable order of parameter indices in which those of one optimizer group are neighbours."""
    return sorted(range(len(groups)), key=lambda i: groups[i])
