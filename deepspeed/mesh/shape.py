"""Which ranks share what: pure arithmetic over named mesh dims.

Read by everything that asks who works together (`mesh.mesh` makes the process groups, `zero.policy` names the dims that
ZeRO shards over); knows no process group. The ranks of a job are a box of five dims, the last one consecutive:

    pp, dp_replicate, dp_shard, sp, tp            rank = position in that box, row by row

    8 ranks, dp_replicate 2, dp_shard 2, tp 2     tp 01 23 45 67    dp_shard 02 13 46 57    dp_replicate 04 15 26 37

Two further factorings cut the same ranks differently. Experts: the ranks that hold different data are `ep x edp`, inside
one pipeline stage and one tp rank (or across tp: folded). hpZ: those that share parameters are `far x near`.

Whoever needs ranks does not name dims: it asks for a ROLE. Only this folder and `zero.policy` spell a dim, and a test
says so.

Invariant: the groups over any dims partition the ranks, and every rank lists them in the same order.
Rank order after the public contract of the original; expert groups as it makes them ("E+D" and "D+E").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from deepspeed.utils.errors import DeepSpeedConfigError

Dim = Literal["pp", "dp_replicate", "dp_shard", "sp", "tp", "edp", "ep", "far", "near"]
DIMS: tuple[Dim, ...] = ("pp", "dp_replicate", "dp_shard", "sp", "tp")
"""The box, from the outermost dim to the innermost, whose ranks are consecutive."""

DEGREES = ("pp", "dp", "sp", "tp", "ep")
"""What users call the sizes of a layout, on command lines and in names of files: `dp` for all ranks with data of their own."""

Role = Literal[
    "batch", "average", "shard", "replicate", "norm", "whole", "model", "tensor", "pipeline", "sequence",
    "experts", "expert_shard", "near", "far", "checkpoint", "job",
]  # fmt: skip

ROLES: Mapping[Role, tuple[Dim, ...]] = {
    # Each of these ranks reads its own share of a batch.
    "batch": ("dp_replicate", "dp_shard"),
    # They start from the same weights and average their gradients; of a sequence each has seen a part.
    "average": ("dp_replicate", "dp_shard", "sp"),
    # ZeRO cuts over these ...
    "shard": ("dp_shard", "sp"),
    # ... and repeats over these (MiCS, HSDP).
    "replicate": ("dp_replicate",),
    # Together they hold one whole model, each element of a sharded gradient once: a norm is summed over them.
    "norm": ("pp", "dp_shard", "sp", "tp"),
    # Together they hold one whole model where ZeRO repeats it: cut layers, stages, and every expert.
    "whole": ("pp", "ep", "tp"),
    # They hold different pieces of the model itself, for the same samples.
    "model": ("pp", "tp"),
    "tensor": ("tp",),
    "pipeline": ("pp",),
    "sequence": ("sp",),
    # They hold different experts, and exchange tokens ...
    "experts": ("ep",),
    # ... while these hold the same ones, average their gradients, and may shard them.
    "expert_shard": ("edp",),
    # hpZ: a second copy of the parameters is sharded over `near` alone, and repeated over `far`.
    "near": ("near",),
    "far": ("far",),
    # All write one checkpoint together, and have to agree that it is complete.
    "checkpoint": DIMS,
    # Every rank: what ends one rank's run has to end everybody's.
    "job": DIMS,
}

Over = Role | tuple[str, ...]
"""A role, or the dims themselves, as a placement's `sharded_over` hands them on."""

Group = tuple[int, ...]
"""Global ranks."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """The size of every dim, and which rank is where.

    ep, near: sizes of the inner dim of the two other factorings; their outer dims have what is left.
    data_first: "D+E", the ranks with the same expert are consecutive; else those with different ones ("E+D").
    folds_tp: expert dims go over the tp ranks too; else there are expert groups of their own for each tp rank.
    order: the global rank at each position of the box, where it is not the position itself (another library's groups).

    Raises DeepSpeedConfigError where a size does not divide.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    near: int = 1
    data_first: bool = False
    folds_tp: bool = False
    order: Group | None = None

    def __post_init__(self) -> None:
        shared = self.dp_shard * self.sp
        among = self.dp_replicate * shared * (self.tp if self.folds_tp else 1)
        if among % self.ep:
            raise DeepSpeedConfigError(
                f"expert parallel size {self.ep} does not divide the {among} ranks among which experts are spread.\n"
                f"  It must divide the stage size: choose a divisor of {among}."
            )
        if shared % self.near:
            raise DeepSpeedConfigError(
                f"zero_optimization.zero_hpz_partition_size = {self.near} does not divide the {shared} ranks that share "
                f"parameters.\n  Choose a divisor of {shared}; usually the number of ranks on a node."
            )
        assert self.order is None or sorted(self.order) == list(range(self.world_size)), "not an order of all ranks"

    @cached_property
    def world_size(self) -> int:
        """Number of all ranks."""
        return math.prod(getattr(self, dim) for dim in DIMS)

    @cached_property
    def _factorings(self) -> tuple[dict[str, int], ...]:
        """The ways to read a position, each as dims with their sizes from the outermost to the innermost."""
        dense: dict[str, int] = {dim: getattr(self, dim) for dim in DIMS}
        among = self.dp_replicate * self.dp_shard * self.sp * (self.tp if self.folds_tp else 1)
        pair = {"ep": self.ep, "edp": among // self.ep} if self.data_first else {"edp": among // self.ep, "ep": self.ep}
        experts = {"pp": self.pp, **pair, "tp": 1 if self.folds_tp else self.tp}
        far = self.dp_shard * self.sp // self.near
        hpz = {"pp": self.pp, "dp_replicate": self.dp_replicate, "far": far, "near": self.near, "tp": self.tp}
        return dense, experts, hpz

    @cached_property
    def _position_of(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.order or ())}

    def dims(self, over: Over) -> tuple[str, ...]:
        """The dims of a role (or of dims) that have more than one rank, in order: two askers with equal answers mean the
        same groups."""
        named = ROLES[over] if isinstance(over, str) else over
        unknown = [dim for dim in named if dim not in get_args(Dim)]
        assert not unknown, f"{unknown} are no mesh dims; they are {get_args(Dim)}"
        sizes = self._factoring(named)
        return tuple(dim for dim in sizes if dim in named and sizes[dim] > 1)

    def size(self, over: Over) -> int:
        """How many ranks a group has."""
        named = ROLES[over] if isinstance(over, str) else over
        sizes = self._factoring(named)
        return math.prod(sizes[dim] for dim in named)

    def groups(self, over: Over) -> list[Group]:
        """Every group, in an order all ranks agree on."""
        inner, outer = self._offsets(self.dims(over))
        return [tuple(self._rank_at(start + offset) for offset in inner) for start in outer]

    def ranks(self, over: Over, rank: int) -> Group:
        """The group that a rank is in."""
        dims = self.dims(over)
        sizes = self._factoring(dims)
        position = self._position_of[rank] if self.order is not None else rank
        strides = _strides(sizes)
        start = position - sum(position // strides[dim] % sizes[dim] * strides[dim] for dim in dims)
        return tuple(self._rank_at(start + offset) for offset in self._offsets(dims)[0])

    def _factoring(self, dims: Sequence[str]) -> dict[str, int]:
        found = next((sizes for sizes in self._factorings if set(dims) <= set(sizes)), None)
        assert found is not None, f"no factoring of the ranks has all of {tuple(dims)}"
        return found

    def _offsets(self, dims: Sequence[str]) -> tuple[list[int], list[int]]:
        """Positions inside of the first group, and the first position of every group."""
        sizes = self._factoring(dims)
        strides = _strides(sizes)

        def positions(chosen: Sequence[str]) -> list[int]:
            steps = [range(0, sizes[dim] * strides[dim], strides[dim]) for dim in chosen]
            return [sum(parts) for parts in itertools.product(*steps)]

        return positions([dim for dim in sizes if dim in dims]), positions([dim for dim in sizes if dim not in dims])

    def _rank_at(self, position: int) -> int:
        return position if self.order is None else self.order[position]


def _strides(sizes: Mapping[str, int]) -> dict[str, int]:
    """How far apart neighbours over each dim are."""
    strides, stride = {}, 1
    for dim in reversed(list(sizes)):
        strides[dim] = stride
        stride *= sizes[dim]
    return strides


def shape_in_shard_groups(
    num_ranks: int,
    shard_size: int | None = None,
    *,
    near: int = 1,
    pp: int = 1,
    sp: int = 1,
    tp: int = 1,
    order: Group | None = None,
) -> MeshShape:
    """`num_ranks` that average their gradients, as replicas of groups of `shard_size` (None: all in one) ranks.

    Raises DeepSpeedConfigError if the sizes do not divide.
    """
    shard_size = shard_size or num_ranks
    if num_ranks % shard_size:
        raise DeepSpeedConfigError(
            f"zero_optimization.mics_shard_size = {shard_size} does not divide the {num_ranks} data-parallel ranks.\n"
            f"  Choose a divisor of {num_ranks}."
        )
    if shard_size % sp:
        raise DeepSpeedConfigError(
            f"zero_optimization.mics_shard_size = {shard_size} is not a multiple of the {sp} ranks that share a sequence.\n"
            f"  Ranks of one sequence stay in one shard group: choose a multiple of {sp}."
        )
    replicas, dp_shard = num_ranks // shard_size, shard_size // sp
    return MeshShape(pp=pp, dp_replicate=replicas, dp_shard=dp_shard, sp=sp, tp=tp, near=near, order=order)
