"""A user's `mpu`, or process group, turned into a mesh shape: the only place that asks such an object anything.

Called by the engine and by `zero.Init` before anything else is built. An mpu is any object with some of the getters

    get_{data,model,tensor_model,slice,pipe,pipeline_model,sequence}_parallel_{group,rank,world_size}

Each rank reads its place in the four dims from it; all ranks tell each other, and work out the same shape, or the same
error, from what all said. Where data is the only dim told, the ranks between two of its groups count as one tp dim.

Invariant: a rank that cannot read its mpu says so in the same exchange, so that all ranks raise and none waits.
The getters are the public contract of the original, which has them from Megatron-LM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from deepspeed.mesh.mesh import Mesh, open_mesh, world_size
from deepspeed.mesh.shape import Group, MeshShape, shape_in_shard_groups
from deepspeed.utils.errors import DeepSpeedConfigError

_GETTERS = {
    "pp": ("pipe_parallel", "pipeline_model_parallel"),
    "dp": ("data_parallel",),
    "sp": ("sequence_parallel",),
    # A grid's `model_parallel` is pipe x model, and so is Megatron's where it also has `tensor_model_parallel`.
    "tp": ("slice_parallel", "tensor_model_parallel", "model_parallel"),
}
"""What getters of each dim are called, the better name first; here all data-parallel dims are one."""


class Coordinate(NamedTuple):
    """One rank's place in one dim. `ranks`: the whole group, where the mpu has one."""

    rank: int
    size: int
    ranks: Group | None = None


@dataclass(frozen=True)
class Told:
    """What one rank's mpu said: its place in each dim that the mpu knows, or why it could not be read."""

    coordinates: dict[str, Coordinate]
    error: str | None = None


def data_parallel_mesh(
    mpu: Any = None, *, group: Any = None, shard_size: int | None = None, near_size: int = 1, sp: int = 1, tp: int = 1
) -> Mesh:
    """The mesh of all ranks, or of those that `mpu` or a data-parallel `group` tells, in shard groups of `shard_size`
    (default: all in one) with hpZ groups of `near_size`. By the configuration, `sp` ranks share a sequence,
    and `tp` consecutive ones layers.

    Collective over all ranks if `mpu` or `group` is given. Raises DeepSpeedConfigError on every rank if what they tell
    does not fit together, or a size does not divide.
    """
    if mpu is None and group is None:
        if world_size() % tp:
            raise DeepSpeedConfigError(
                f"tensor_parallel.autotp_size = {tp} does not divide the {world_size()} ranks of the job.\n"
                f"  Choose a divisor of {world_size()}."
            )
        return open_mesh(shape_in_shard_groups(world_size() // tp, shard_size, near=near_size, sp=sp, tp=tp))
    groups: dict[str, Any] = {}
    told = read_group(group, groups) if mpu is None else read_mpu(mpu, groups)
    everyone: list[Any] = [told] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, told)
    shape = shape_of(everyone, shard_size=shard_size, near_size=near_size)
    given = {shape.dims("batch" if dim == "dp" else (dim,)): made for dim, made in groups.items()}
    return open_mesh(shape, {dims: made for dims, made in given.items() if dims})


def read_group(group: Any, groups: dict[str, Any]) -> Told:
    """A data-parallel process group as an mpu that knows no more. Puts the group into `groups`."""
    groups["dp"] = group
    ranks = tuple(dist.get_process_group_ranks(group))
    return Told({"dp": Coordinate(ranks.index(dist.get_rank()), len(ranks), ranks)})


def read_mpu(mpu: Any, groups: dict[str, Any]) -> Told:
    """This rank's places by an mpu; never raises. Puts the process groups it gave into `groups`."""
    coordinates: dict[str, Coordinate] = {}
    for dim, names in _GETTERS.items():
        if dim == "tp" and hasattr(mpu, "initialize_sequence_parallel"):
            names = names[
                :1
            ]  # the contract's module of sequence parallelism: its model-parallel getters mean the sequence
        try:
            coordinate = _coordinate(mpu, names, dim, groups)
        except AssertionError:
            # Megatron's getters assert that their groups were made; a dim without groups is not used.
            if dim != "dp":
                continue
            return Told({}, f"{type(mpu).__name__} has not made its {names[0]} groups")
        except Exception as error:
            return Told(
                {}, f"{type(mpu).__name__} could not tell its {names[0]} group: {type(error).__name__}: {error}"
            )
        if coordinate is not None:
            coordinates[dim] = coordinate
    if "dp" not in coordinates:
        return Told({}, f"{type(mpu).__name__} has neither get_data_parallel_group nor get_data_parallel_world_size")
    return Told(coordinates)


def _coordinate(mpu: Any, names: Sequence[str], dim: str, groups: dict[str, Any]) -> Coordinate | None:
    for name in names:
        group_of, size_of, rank_of = (
            getattr(mpu, f"get_{name}_{what}", None) for what in ("group", "world_size", "rank")
        )
        group = group_of() if callable(group_of) else None
        if isinstance(group, dist.ProcessGroup):
            groups[dim] = group
            ranks = tuple(dist.get_process_group_ranks(group))
            coordinate = Coordinate(ranks.index(dist.get_rank()), len(ranks), ranks)
            if callable(size_of) and int(size_of()) != coordinate.size:
                raise ValueError(f"get_{name}_world_size() is {size_of()}, its group has {coordinate.size} ranks")
            return coordinate
        if callable(size_of):
            return Coordinate(int(rank_of()) if callable(rank_of) else 0, int(size_of()))
    return None


def tensor_coordinate(mpu: Any) -> tuple[Coordinate | None, Any]:
    """This rank's place among the ranks that split layers, by an mpu alone, and their group; (None, None) where it does not
    tell. Not collective."""
    groups: dict[str, Any] = {}
    coordinate = _coordinate(mpu, _GETTERS["tp"], "tp", groups)
    return coordinate, groups.get("tp")


def shape_of(everyone: Sequence[Told], *, shard_size: int | None = None, near_size: int = 1) -> MeshShape:
    """The shape that all ranks' words describe. Raises DeepSpeedConfigError where there is none; pure."""
    errors = {rank: told.error for rank, told in enumerate(everyone) if told.error}
    if errors:
        rank, text = next(iter(errors.items()))
        raise _refusal(f"on rank {rank}{_and_more(len(errors))}: {text}.")
    sizes = _common_sizes(everyone)
    world = len(everyone)
    if set(sizes) == {"dp"} and all(told.coordinates["dp"].ranks for told in everyone):
        everyone = _with_rest_as_tp(everyone)
        sizes = _common_sizes(everyone)
    if math.prod(sizes.values()) != world:
        text = " x ".join(f"{_GETTERS[dim][0]} {size}" for dim, size in sizes.items())
        raise _refusal(f"its sizes do not make up the {world} ranks of the job: {text} = {math.prod(sizes.values())}.")
    order = _order(everyone, sizes)
    sp = sizes.get("sp", 1)
    shape = shape_in_shard_groups(
        sizes["dp"] * sp,
        shard_size,
        near=near_size,
        pp=sizes.get("pp", 1),
        sp=sp,
        tp=sizes.get("tp", 1),
        order=None if order == tuple(range(world)) else order,
    )
    _check_groups(everyone, shape)
    return shape


def _refusal(text: str) -> DeepSpeedConfigError:
    return DeepSpeedConfigError(
        f"the mpu (or data-parallel group) given to deepspeed: {text}\n"
        "  Every rank must pass one, all made with the same sizes; each rank is in one group of every kind, and two groups "
        "of different kinds share at most one rank."
    )


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _common_sizes(everyone: Sequence[Told]) -> dict[str, int]:
    first = {dim: coordinate.size for dim, coordinate in everyone[0].coordinates.items()}
    for rank, told in enumerate(everyone):
        theirs = {dim: coordinate.size for dim, coordinate in told.coordinates.items()}
        if theirs != first:
            raise _refusal(f"rank 0 tells sizes {_names(first)}, rank {rank} {_names(theirs)}.")
    return first


def _names(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_GETTERS[dim][0]} {size}" for dim, size in sizes.items())


def _with_rest_as_tp(everyone: Sequence[Told]) -> list[Told]:
    """Data alone is told: the i-th data-parallel group, by its lowest rank, is the i-th tp rank's."""
    groups = list(dict.fromkeys(told.coordinates["dp"].ranks for told in everyone))
    return [
        Told({**told.coordinates, "tp": Coordinate(groups.index(told.coordinates["dp"].ranks), len(groups))})
        for told in everyone
    ]


def _order(everyone: Sequence[Told], sizes: dict[str, int]) -> Group:
    """The rank at each position of the box; pp is outermost, tp innermost."""
    at: dict[int, int] = {}
    for rank, told in enumerate(everyone):
        position = 0
        for dim in _GETTERS:
            coordinate = told.coordinates.get(dim, Coordinate(0, 1))
            if not 0 <= coordinate.rank < coordinate.size:
                raise _refusal(
                    f"rank {rank} is number {coordinate.rank} of {coordinate.size} in its {_GETTERS[dim][0]} group."
                )
            position = position * coordinate.size + coordinate.rank
        if position in at:
            where = ", ".join(f"{_GETTERS[dim][0]} {coordinate.rank}" for dim, coordinate in told.coordinates.items())
            raise _refusal(f"ranks {at[position]} and {rank} have the same place: {where}.")
        at[position] = rank
    return tuple(at[position] for position in range(math.prod(sizes.values())))


def _check_groups(everyone: Sequence[Told], shape: MeshShape) -> None:
    """Groups that were told must be those that the places describe."""
    for rank, told in enumerate(everyone):
        for dim, coordinate in told.coordinates.items():
            expected = shape.ranks("batch" if dim == "dp" else (dim,), rank)
            if coordinate.ranks is not None and sorted(coordinate.ranks) != sorted(expected):
                raise _refusal(
                    f"rank {rank}'s {_GETTERS[dim][0]} group is {list(coordinate.ranks)}, but by the places that all ranks told it "
                    f"would be {list(expected)}."
                )
