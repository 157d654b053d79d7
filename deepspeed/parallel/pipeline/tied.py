"""Parameters that several stages have: equal at first, and their gradients summed over the stages before anything else.

One key is one module, as it would be in one process: beside the parameters that a `TiedLayerSpec` names, all others that each of its
owners has under the same name are shared too, such as the position embedding of an embedding that is read backwards on the last stage.

Made by `module.PipelineModule`; the sums are asked for by the engine once per batch, before ranks that share a batch average
theirs. In the gradient norm the first owner's counts (`mesh.marks`).

Invariant: all owners of a tied parameter step it with the same gradient, so they stay equal without being sent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.mesh import marks
from deepspeed.parallel.pipeline.grid import GROUPS
from deepspeed.parallel.pipeline.layers import weight_at
from deepspeed.parallel.pipeline.topology import ProcessTopology


@dataclass(frozen=True)
class Tie:
    """One key's shared parameters on this rank, and the ranks that have them too. `group`: None where they are all here."""

    key: str
    module: nn.Module
    attrs: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    ranks: tuple[int, ...]
    group: Any

    def make_equal(self) -> None:
        """The first owner's values to all. Collective over the owners."""
        for param in self.params if self.group is not None else ():
            if param.numel():  # else sharded by zero.Init
                dist.broadcast(param.data, src=self.ranks[0], group=self.group)

    def described(self) -> dict[str, Any]:
        """As scripts ask for it."""
        return {"ranks": list(self.ranks), "group": self.group, "weight_attr": list(self.attrs), "module": self.module}


def make_ties(
    owners: Mapping[str, Sequence[int]],
    modules: Mapping[str, nn.Module],
    attrs: Mapping[str, Sequence[str]],
    topology: ProcessTopology,
    rank: int,
) -> list[Tie]:
    """The ties of this rank, their parameters made equal. Collective over the job.

    owners: by key the pipeline ranks that have it; modules, attrs: this rank's, and what of them is shared.
    """
    ties = []
    for key, stages in owners.items():
        made = GROUPS.share("tied", _lists(topology, sorted(set(stages)))) if len(set(stages)) > 1 else None
        if key not in modules:
            continue
        params = [weight_at(modules[key], attr, key) for attr in attrs[key]]
        if made is not None:
            params += _others(modules[key], params, made.group, len(made.own))
        ranks = made.own if made is not None else (rank,)
        tie = Tie(key, modules[key], tuple(attrs[key]), tuple(params), ranks, made.group if made is not None else None)
        ties.append(tie)
        tie.make_equal()
        for param in tie.params if made is not None else ():
            is_first = rank == tie.ranks[0]
            param.__dict__["ds_pipe_replicated"] = not is_first
            marks.mark_tied(param, counts=is_first)
    return ties


def _others(module: nn.Module, named: list[nn.Parameter], group: Any, num_owners: int) -> list[nn.Parameter]:
    """What all owners have beside the parameters that were named, in one order. Collective over them."""
    taken = {id(param) for param in named}
    found = {name: param for name, param in module.named_parameters() if id(param) not in taken}
    own = {name: (tuple(getattr(p, "ds_shape", p.shape)), p.dtype, p.requires_grad) for name, p in found.items()}
    everyone: list[dict[str, Any]] = [{}] * num_owners
    dist.all_gather_object(everyone, own, group=group)
    return [found[name] for name in everyone[0] if all(o.get(name) == everyone[0][name] for o in everyone)]


def _lists(topology: ProcessTopology, stages: Sequence[int]) -> list[list[int]]:
    """The owners in each pipeline, and the other ranks alone."""
    lists = [[ranks[stage] for stage in stages] for ranks in topology.get_axis_comm_lists("pipe")]
    in_one = {rank for ranks in lists for rank in ranks}
    return lists + [[rank] for rank in range(topology.world_size()) if rank not in in_one]


def sum_over_owners(tie: Tie, gradient: Tensor) -> None:
    """Sum a gradient over the owners, in place. Collective over them."""
    if tie.group is not None:
        dist.all_reduce(gradient, group=tie.group)
