"""The mesh of one engine: the process groups of its shape, made when they are first asked for.

Made by the engine (`mesh.door` finds the shape); asked by role or by dims for groups, exchanges and small agreements.
Which ranks are in a group is `mesh.shape`'s arithmetic, done once per question and kept.

Every purpose has groups of its own (`gather`, `reduce`, `control`), because collectives of one group must be launched
in one order, and gathers are launched in the order of use while reductions are launched in the order of backward.
Groups are shared by all engines of a process whose meshes have one shape, and destroyed with the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepspeed.comm.circle import Circle, bytes_of_gather, bytes_of_largest
from deepspeed.comm.exchange import Exchange, LocalExchange
from deepspeed.comm.observe import make_observed
from deepspeed.mesh.shape import MeshShape, Over
from deepspeed.utils.waits import COMMUNICATION

ProcessGroup = Any
T = TypeVar("T")

NUM_TELL_ALL = 4
"""Up to so many ranks tell each other everything at once: no more bytes than the extremes would be, and exact."""


@dataclass
class Mesh:
    """The groups that this rank is in."""

    shape: MeshShape
    global_rank: int
    num_users: int = 0
    given: dict[tuple[str, ...], ProcessGroup] = field(default_factory=dict)
    """Groups that the script brought itself (its mpu's), by dims. ZeRO does not use them: their order is the script's."""
    _groups: dict[tuple[tuple[str, ...], str], ProcessGroup] = field(default_factory=dict)
    _circles: dict[tuple[str, ...], Circle] = field(default_factory=dict)
    _ranks: dict[Over, tuple[int, ...]] = field(default_factory=dict)

    def ranks(self, over: Over) -> tuple[int, ...]:
        """Global ranks of this rank's group."""
        if over not in self._ranks:
            self._ranks[over] = self.shape.ranks(over, self.global_rank)
        return self._ranks[over]

    def size(self, over: Over) -> int:
        """How many ranks are in this rank's group."""
        return len(self.ranks(over))

    def rank(self, over: Over) -> int:
        """This rank's position in its group."""
        return self.ranks(over).index(self.global_rank)

    def group(self, over: Over, purpose: str, backend: str | None = None) -> ProcessGroup | None:
        """The process group for `purpose`; None where this rank is alone in it.

        Made at first use, which is collective over all ranks of the job. Roles over the same ranks share groups.
        """
        if self.size(over) == 1:
            return None
        key = self.shape.dims(over), purpose
        if key not in self._groups:
            name = f"{'+'.join(key[0])}.{purpose}"
            for ranks in self.shape.groups(over):
                made = dist.new_group(list(ranks), backend=backend, group_desc=name)
                if self.global_rank in ranks:
                    self._groups[key] = made
        return self._groups[key]

    def exchange(self, over: Over, purpose: str, device: torch.device) -> Exchange:
        """The way flat buffers on `device` move between the ranks. Collective over the job at first use."""
        group = self.group(over, purpose)
        return LocalExchange(None) if group is None else make_observed(group, device)

    def agree(self, over: Over, *values: int) -> list[tuple[int, ...]]:
        """Tell every rank of the group some int64; theirs in rank order. Collective, and waits on the host.

        For what usually is the same everywhere: if it is, that takes one small all-reduce; if not, a gather more.
        """
        return self.start_agree(over, *values)()

    def start_agree(self, over: Over, *values: int) -> Callable[[], list[tuple[int, ...]]]:
        """Begin `agree`; what is returned waits for the others. Every rank begins, and ends, them in one order."""
        num_ranks = self.size(over)
        if num_ranks == 1:
            return lambda: [values]
        circle = self._circle(over)
        if num_ranks <= NUM_TELL_ALL:
            return self._waiting(circle.start_gather(values), bytes_of_gather(num_ranks, len(values)))
        # ~ turns the order round without an overflow, so the largest of ~v is ~ of the smallest v.
        words = (*values, *(~value for value in values))
        wait = self._waiting(circle.start_largest(words), bytes_of_largest(num_ranks, len(words)))

        def answers() -> list[tuple[int, ...]]:
            found = wait()
            largest, smallest = found[: len(values)], tuple(~value for value in found[len(values) :])
            return [largest] * num_ranks if largest == smallest else self.gather_ints(over, *values)

        return answers

    def gather_ints(self, over: Over, *values: int) -> list[tuple[int, ...]]:
        """As `agree`, for what usually differs from rank to rank."""
        num_ranks = self.size(over)
        if num_ranks == 1:
            return [values]
        return self._waiting(self._circle(over).start_gather(values), bytes_of_gather(num_ranks, len(values)))()

    def _circle(self, over: Over) -> Circle:
        dims = self.shape.dims(over)
        if dims not in self._circles:
            group = self.group(over, "control", "gloo")
            assert group is not None, "a rank alone has nobody to ask"
            self._circles[dims] = Circle(group)
        return self._circles[dims]

    def _waiting(self, wait: Callable[[], T], nbytes: int) -> Callable[[], T]:
        def counted() -> T:
            with COMMUNICATION.during("zero.agree", nbytes):
                return wait()

        return counted

    def gather_objects(self, over: Over, value: Any) -> list[Any]:
        """Tell every rank of the group a small picklable value; theirs in rank order. Collective."""
        found = [value] * self.size(over)
        if len(found) > 1:
            dist.all_gather_object(found, value, group=self.group(over, "control", "gloo"))
        return found

    def release(self) -> None:
        """One engine less; the last one destroys the groups."""
        self.num_users -= 1
        if self.num_users == 0:
            for group in self._groups.values():
                if dist.is_initialized():
                    dist.destroy_process_group(group)
            self._groups.clear()
            self._circles.clear()
            _meshes.pop(self.shape, None)


_meshes: dict[MeshShape, Mesh] = {}
"""Meshes in use, the last opened one last."""


def open_mesh(shape: MeshShape, given: dict[tuple[str, ...], ProcessGroup] | None = None) -> Mesh:
    """The mesh of a shape, with one user more; whoever opens it calls `release`. `given`: groups the script brought."""
    mesh = _meshes.pop(shape, None) or Mesh(shape, dist.get_rank() if _is_up() else 0)
    mesh.given = given or mesh.given
    mesh.num_users += 1
    _meshes[shape] = mesh
    return mesh


def current_mesh() -> Mesh:
    """The mesh that was opened last; without one, that of all ranks under data parallelism alone. Not collective."""
    if _meshes:
        return next(reversed(_meshes.values()))
    return Mesh(MeshShape(dp_shard=world_size()), dist.get_rank() if _is_up() else 0)


def world_size() -> int:
    """Number of all ranks; 1 before torch.distributed is initialised."""
    return dist.get_world_size() if _is_up() else 1


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()
