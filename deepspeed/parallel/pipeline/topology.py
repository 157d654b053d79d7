"""Ranks as points of a box of named axes: pure arithmetic behind `deepspeed.runtime.pipe.topology`.

Used by scripts, which name the axes of their parallelism, and by `parallel.pipeline.grid`, which makes groups of it.
The first axis is the outermost, the last varies fastest:

    PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)     pipe, data, model     rank 5 = pipe 1, data 0, model 1

Invariant: `get_rank` and `get_coord` are each other's inverse. Names and answers are the public contract of the original;
our own code asks `mesh.shape`, which knows the dims of the whole package, not axes that a script may name as it likes.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from deepspeed.utils.errors import DeepSpeedConfigError


class ProcessTopology:
    """A box of ranks. `axes`: names from the outermost to the innermost; `dims`: their sizes."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) != len(axes) or any(size < 1 for size in dims):
            raise DeepSpeedConfigError(
                f"ProcessTopology(axes={list(axes)}, dims={list(dims)}): give one positive size for each name, each name once."
            )
        self.axes, self.dims = list(axes), list(dims)
        coord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]
        self.ProcessCoord = coord
        points = itertools.product(*(range(size) for size in dims))
        self.mapping: dict[Any, int] = {coord(*point): rank for rank, point in enumerate(points)}
        self._coords = list(self.mapping)

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a point; every axis must be given. Raises a ValueError (and AssertionError) for any other."""
        if set(coord_kwargs) != set(self.axes):
            raise DeepSpeedConfigError(
                f"get_rank() needs each of the axes {self.axes} once, got {sorted(coord_kwargs)}; to leave some open use filter_match()."
            )
        point = self.ProcessCoord(**coord_kwargs)
        if point not in self.mapping:
            raise DeepSpeedConfigError(
                f"there is no rank at {point}: the sizes are {dict(zip(self.axes, self.dims, strict=True))}."
            )
        return self.mapping[point]

    def get_axis_names(self) -> list[str]:
        """The axes, outermost first."""
        return self.axes

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """A rank's place in the axes that are not left out, as in file names: "model_00"."""
        coord = self.get_coord(rank)
        named = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in named)

    def get_dim(self, axis: str) -> int:
        """An axis's size; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """A rank's point, a named tuple. Raises a ValueError for a rank that is not there."""
        if not 0 <= rank < len(self._coords):
            raise DeepSpeedConfigError(f"rank {rank} is not in the topology of {len(self._coords)} ranks.")
        return self._coords[rank]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ in this axis alone; none for an axis that is not there."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        groups: dict[tuple[int, ...], list[int]] = {}
        for coord, rank in self.mapping.items():
            groups.setdefault(tuple(getattr(coord, name) for name in others), []).append(rank)
        return list(groups.values())

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks at the given places, in order; axes that are not given are open."""
        wanted = filter_kwargs.items()
        return [rank for coord, rank in self.mapping.items() if all(getattr(coord, axis) == at for axis, at in wanted)]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at one place of one axis."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._coords)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages outside, data parallelism inside: gradients are reduced between near ranks."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data"], dims=[num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline, data and model parallelism, from outside in."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(axes=["pipe", "data", "model"], dims=[num_pp, num_dp, num_mp])


def _prime_factors(n: int) -> list[int]:
    """The prime factors of a positive number in ascending order, each as often as it divides."""
    if n <= 0:
        raise DeepSpeedConfigError(f"{n} has no prime factors: it is not positive.")
    found: list[int] = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1
    return found + ([n] if n > 1 else [])
