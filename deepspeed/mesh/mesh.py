"""The mesh of one engine: the data-parallel ranks, cut into `dp_replicate` x `dp_shard`.

Made by the engine; asked for process groups by name. ZeRO shards over `dp_shard` and repeats over `dp_replicate`
(HSDP, MiCS); plain ZeRO has one replica. Consecutive ranks form a shard group, so that it stays on one node if it fits.

    ranks 0..7, shard size 4:      dp_shard  {0,1,2,3} {4,5,6,7}      dp_replicate  {0,4} {1,5} {2,6} {3,7}
    near size 2 (hpZ):             dp_near   {0,1} {2,3} {4,5} {6,7}

Every purpose has groups of its own (`gather`, `reduce`, `control`), because collectives of one group must be launched
in one order, and gathers are launched in the order of use while reductions are launched in the order of backward.
Groups are shared by all engines of a process and destroyed with the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.comm.exchange import Exchange, LocalExchange
from deepspeed.comm.observe import make_observed
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.waits import COMMUNICATION

Group = Any


@dataclass(frozen=True)
class MeshShape:
    """All data-parallel groups of the job (global ranks, each rank in one), and how each is cut."""

    dp_groups: tuple[tuple[int, ...], ...]
    shard_size: int
    near_size: int = 1

    def groups(self, dim: str) -> list[tuple[int, ...]]:
        """Every group over "dp", "dp_shard", "dp_replicate" or "dp_near", in an order all ranks agree on."""
        size = {"dp_shard": self.shard_size, "dp_replicate": self.shard_size, "dp_near": self.near_size}.get(dim, 0)
        found: list[tuple[int, ...]] = []
        for ranks in self.dp_groups:
            if dim == "dp":
                found.append(ranks)
            elif dim == "dp_replicate":
                found += [ranks[i::size] for i in range(size)]
            else:
                found += [ranks[i : i + size] for i in range(0, len(ranks), size)]
        return found


@dataclass
class Mesh:
    """The groups that this rank is in."""

    shape: MeshShape
    rank: int
    num_users: int = 0
    _groups: dict[tuple[str, str], Group] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the data-parallel group."""
        return self.ranks_of("dp")

    @property
    def dp_world_size(self) -> int:
        """Number of data-parallel ranks."""
        return len(self.ranks)

    @property
    def dp_rank(self) -> int:
        """This rank's position among the data-parallel ranks."""
        return self.ranks.index(self.rank)

    @property
    def near_size(self) -> int:
        """Size of `dp_near`."""
        return self.shape.near_size

    @property
    def num_replicas(self) -> int:
        """Size of `dp_replicate`."""
        return self.dp_world_size // self.shape.shard_size

    def ranks_of(self, dim: str) -> tuple[int, ...]:
        """Global ranks of this rank's group over a dim."""
        return next(ranks for ranks in self.shape.groups(dim) if self.rank in ranks)

    def group(self, dim: str, purpose: str, backend: str | None = None) -> Group | None:
        """The process group over `dim` for `purpose`; None where this rank is alone in it.

        Made at first use, which is collective over all ranks of the job.
        """
        if len(self.ranks_of(dim)) == 1:
            return None
        if (dim, purpose) not in self._groups:
            for ranks in self.shape.groups(dim):
                made = dist.new_group(list(ranks), backend=backend, group_desc=f"{dim}.{purpose}")
                if self.rank in ranks:
                    self._groups[dim, purpose] = made
        return self._groups[dim, purpose]

    def exchange(self, dim: str, purpose: str, device: torch.device) -> Exchange:
        """The way flat buffers on `device` move over `dim`. Collective over the ranks of the group at first use."""
        group = self.group(dim, purpose)
        return LocalExchange(None) if group is None else make_observed(group, device)

    def agree(self, dim: str, *values: int) -> list[tuple[int, ...]]:
        """Tell every rank of `dim` some integers; theirs in rank order. Collective, and waits on the host."""
        ranks = self.ranks_of(dim)
        if len(ranks) == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64)
        theirs = [torch.empty_like(mine) for _ in ranks]
        with COMMUNICATION.during("zero.agree", mine.nbytes * len(ranks)):
            dist.all_gather(theirs, mine, group=self.group(dim, "control", "gloo"))
        return [tuple(other.tolist()) for other in theirs]

    def gather_objects(self, dim: str, value: Any) -> list[Any]:
        """Tell every rank of `dim` a small picklable value; theirs in rank order. Collective."""
        ranks = self.ranks_of(dim)
        found = [value] * len(ranks)
        if len(ranks) > 1:
            dist.all_gather_object(found, value, group=self.group(dim, "control", "gloo"))
        return found

    def release(self) -> None:
        """One engine less; the last one destroys the groups."""
        self.num_users -= 1
        if self.num_users == 0:
            for group in self._groups.values():
                if dist.is_initialized():
                    dist.destroy_process_group(group)
            self._groups.clear()
            _meshes.pop(self.shape, None)


_meshes: dict[MeshShape, Mesh] = {}


def data_parallel_mesh(
    dp_ranks: Sequence[int] | None = None, shard_size: int | None = None, near_size: int = 1
) -> Mesh:
    """The mesh whose data-parallel group is `dp_ranks` (default: all ranks), in shard groups of `shard_size` (default:
    all in one), with hpZ groups of `near_size`. Collective over all ranks if `dp_ranks` is given.

    Raises DeepSpeedConfigError if the shard size does not divide the number of ranks, or `near_size` the shard size.
    """
    is_up = dist.is_available() and dist.is_initialized()
    everyone = tuple(range(dist.get_world_size() if is_up else 1))
    ranks = tuple(dp_ranks or everyone)
    shard_size = shard_size or len(ranks)
    if len(ranks) % shard_size:
        raise DeepSpeedConfigError(
            f"zero_optimization.mics_shard_size = {shard_size} does not divide the {len(ranks)} data-parallel ranks.\n"
            f"  Choose a divisor of {len(ranks)}."
        )
    if shard_size % near_size:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size = {near_size} does not divide the {shard_size} ranks that share "
            f"parameters.\n  Choose a divisor of {shard_size}; usually the number of ranks on a node."
        )
    dp_groups = [everyone] if ranks == everyone else _all_groups(ranks)
    shape = MeshShape(tuple(dp_groups), shard_size, near_size)
    mesh = _meshes.setdefault(shape, Mesh(shape, dist.get_rank() if is_up else 0))
    mesh.num_users += 1
    return mesh


def _all_groups(mine: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every rank's data-parallel group, each once."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return sorted(set(theirs))
