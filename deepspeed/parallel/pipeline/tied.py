"""Parameters that several stages have: equal at first, and their gradients summed over the stages before anything else.

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
        params = tuple(weight_at(modules[key], attr, key) for attr in attrs[key])
        ranks = made.own if made is not None else (rank,)
        tie = Tie(key, modules[key], tuple(attrs[key]), params, ranks, made.group if made is not None else None)
        ties.append(tie)
        if made is not None:
            _make_equal(tie, rank)
    return ties


def _lists(topology: ProcessTopology, stages: Sequence[int]) -> list[list[int]]:
    """The owners in each pipeline, and the other ranks alone."""
    lists = [[ranks[stage] for stage in stages] for ranks in topology.get_axis_comm_lists("pipe")]
    in_one = {rank for ranks in lists for rank in ranks}
    return lists + [[rank] for rank in range(topology.world_size()) if rank not in in_one]


def _make_equal(tie: Tie, rank: int) -> None:
    for param in tie.params:
        if param.numel():  # else sharded by zero.Init
            dist.broadcast(param.data, src=tie.ranks[0], group=tie.group)
        is_first = rank == tie.ranks[0]
        param.__dict__["ds_pipe_replicated"] = not is_first
        marks.mark_tied(param, counts=is_first)


def sum_over_owners(tie: Tie, gradient: Tensor) -> None:
    """Sum a gradient over the owners, in place. Collective over them."""
    if tie.group is not None:
        dist.all_reduce(gradient, group=tie.group)
