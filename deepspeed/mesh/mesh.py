"""The mesh of one engine: the process groups of its shape, made when they are first asked for.

Made by the engine (`mesh.door` finds the shape); asked by role or by dims for groups, exchanges and small agreements.
Which ranks are in a group is `mesh.shape`'s arithmetic, done once per question and kept.

Every purpose has groups of its own (`gather`, `reduce`, `control`), because collectives of one group must be launched
in one order, and gathers are launched in the order of use while reductions are launched in the order of backward.

Note [Groups outlive engines]
    Making a group is collective over the job; when Python collects an engine is each rank's own. A rank that keeps its
    best engine, or holds one in the frame of a caught exception, would have groups that the others make anew, and all
    would wait. So groups belong to the default process group: all engines whose meshes have one shape share them, and
    they end when it ends. `alike_everywhere` makes sure, before an engine uses them, that every rank has the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepspeed.comm.choose import make_exchange, make_ring, sharing_of, timeout_of
from deepspeed.comm.exchange import Agreement, Exchange, Ring
from deepspeed.comm.local import LocalExchange
from deepspeed.mesh.shape import MeshShape, Over

ProcessGroup = Any
T = TypeVar("T")


@dataclass
class Mesh:
    """The groups that this rank is in."""

    shape: MeshShape
    global_rank: int
    world: ProcessGroup | None = None
    """The default process group, with which the groups end."""
    num_users: int = 0
    """Engines that live; only those are asked about by `current_mesh`."""
    given: dict[tuple[str, ...], ProcessGroup] = field(default_factory=dict)
    """Groups that the script brought itself (its mpu's), by dims. ZeRO does not use them: their order is the script's."""
    _groups: dict[tuple[tuple[str, ...], str], ProcessGroup] = field(default_factory=dict)
    _circles: dict[tuple[str, ...], Ring] = field(default_factory=dict)
    _ranks: dict[Over, tuple[int, ...]] = field(default_factory=dict)
    _agreements: dict[Over, Agreement] = field(default_factory=dict)
    _shared: dict[str, Any] = field(default_factory=dict)
    _until: ExitStack | None = None
    """With what the exchanges that are opened now give back their memory."""

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
                made = dist.new_group(list(ranks), timeout_of(), backend, group_desc=name)
                if self.global_rank in ranks:
                    self._groups[key] = made
        return self._groups[key]

    def replace(self, before: ProcessGroup, after: ProcessGroup) -> None:
        """Another group of the same ranks takes the place of one in which messages were left."""
        for key in [key for key, group in self._groups.items() if group is before]:
            self._groups[key] = after

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What belongs to the groups rather than to one engine (the order of their messages, say): made at first use."""
        if name not in self._shared:
            with self.opening(None):
                self._shared[name] = make()
        found: T = self._shared[name]
        return found

    @contextmanager
    def opening(self, until: ExitStack | None) -> Iterator[None]:
        """Memory of exchanges that are opened inside is given back when `until` is closed, on each rank for itself."""
        before, self._until = self._until, until
        try:
            yield
        finally:
            self._until = before

    def exchange(self, over: Over, purpose: str, device: torch.device) -> Exchange:
        """The way flat buffers on `device` move between the ranks. Collective over the job at first use."""
        group = self.group(over, purpose)
        if group is None:
            return LocalExchange(None)
        return make_exchange(group, device, sharing=sharing_of(os.environ), until=self._until, is_watched=True)

    def agreement(self, over: Over) -> Agreement:
        """How the ranks of the group agree on integers, for whoever does it again and again."""
        found = self._agreements.get(over)
        if found is None:
            make = functools.partial(self._circle, over)
            found = Agreement(self.size(over), self._circles, self.shape.dims(over), make)
            self._agreements[over] = found
        return found

    def agree(self, over: Over, *values: int) -> list[tuple[int, ...]]:
        """Tell every rank of the group some int64; theirs in rank order. Collective, and waits on the host.

        For what usually is the same everywhere: if it is, that takes one small all-reduce; if not, a gather more.
        """
        return self.agreement(over)(*values)

    def start_agree(self, over: Over, *values: int) -> Callable[[], list[tuple[int, ...]]]:
        """Begin `agree`; what is returned waits for the others. Every rank begins, and ends, them in one order."""
        return self.agreement(over).start(*values)

    def gather_ints(self, over: Over, *values: int) -> list[tuple[int, ...]]:
        """As `agree`, for what usually differs from rank to rank."""
        return self.agreement(over).gather(*values)

    def _circle(self, over: Over) -> Ring:
        dims = self.shape.dims(over)
        if dims not in self._circles:
            group = self.group(over, "control", "gloo")
            assert group is not None, "a rank alone has nobody to ask"
            self._circles[dims] = make_ring(group, sharing=sharing_of(os.environ))
        return self._circles[dims]

    def gather_objects(self, over: Over, value: Any) -> list[Any]:
        """Tell every rank of the group a small picklable value; theirs in rank order. Collective."""
        found = [value] * self.size(over)
        if len(found) > 1:
            dist.all_gather_object(found, value, group=self.group(over, "control", "gloo"))
        return found

    def release(self) -> None:
        """One engine less. The groups stay; see Note [Groups outlive engines]."""
        self.num_users -= 1


_meshes: dict[MeshShape, Mesh] = {}
"""One for each shape there was under the default process group of now, the last opened one last."""


def open_mesh(shape: MeshShape, given: dict[tuple[str, ...], ProcessGroup] | None = None) -> Mesh:
    """The mesh of a shape, with one user more; whoever opens it calls `release`. `given`: groups the script brought."""
    mesh = _meshes.pop(shape, None)
    if mesh is None or mesh.world is not _world():
        mesh = _new_mesh(shape)
    for other in [other for other, theirs in _meshes.items() if theirs.world is not mesh.world]:
        del _meshes[other]
    mesh.given = given or mesh.given
    mesh.num_users += 1
    _meshes[shape] = mesh
    return mesh


def with_experts(mesh: Mesh, ep: int, *, data_first: bool = False) -> Mesh:
    """The mesh, with experts spread over `ep` ranks: consecutive ones, or with `data_first` those that are furthest apart.

    Takes over the user that `open_mesh` counted. Raises DeepSpeedConfigError for a size that does not divide.
    """
    if ep == 1:
        return mesh
    shape = replace(mesh.shape, ep=ep, data_first=data_first)
    mesh.release()
    return open_mesh(shape, mesh.given)


def forget_given(group: ProcessGroup) -> None:
    """Have no mesh answer with a group that its script is about to destroy."""
    for mesh in _meshes.values():
        mesh.given = {dims: given for dims, given in mesh.given.items() if given is not group}


def alike_everywhere(mesh: Mesh) -> Mesh:
    """The mesh, or where ranks have not made the same groups of it (one failed half way) a new one on every rank.

    Takes over the user that `open_mesh` counted. Collective over the job.
    """
    made = [(dims, purpose) for dims, purpose in mesh._groups], [c.num_calls for c in mesh._circles.values()]
    if all(theirs == made for theirs in told_by_all(made)):
        return mesh
    mesh.release()
    _meshes.pop(mesh.shape, None)
    return open_mesh(mesh.shape, mesh.given)


def current_mesh() -> Mesh:
    """The mesh that was opened last and is in use; without one, that of all ranks under data parallelism alone. Not
    collective."""
    used = (mesh for mesh in reversed(_meshes.values()) if mesh.num_users > 0 and mesh.world is _world())
    return next(used, None) or _new_mesh(MeshShape(dp_shard=world_size()))


def _new_mesh(shape: MeshShape) -> Mesh:
    return Mesh(shape, dist.get_rank() if _is_up() else 0, _world())


def _world() -> ProcessGroup | None:
    return dist.group.WORLD if _is_up() else None


def told_by_all(value: Any) -> list[Any]:
    """A small picklable value of every rank, before there is a mesh. Collective over the job."""
    everyone: list[Any] = [value] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def world_size() -> int:
    """Number of all ranks; 1 before torch.distributed is initialised."""
    return dist.get_world_size() if _is_up() else 1


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()
