"""The placement table: where parameters, gradients and optimizer state rest at each ZeRO stage.

Built once by the engine from the configuration; read by the buckets (parameters), the reducer (gradients) and the
optimizer (states). Nothing below asks for "the stage"; it asks a placement whether it is sharded. Which ranks those are for one
bucket is not here: `zero/plan.py` (`shared_over`), by the roles in `mesh/shape.py`.

    ZeRO stage   parameters     gradients      optimizer state
    0            replicated     replicated     replicated
    1            replicated     replicated     dp_shard, sp
    2            replicated     dp_shard, sp   dp_shard, sp
    3            dp_shard, sp   dp_shard, sp   dp_shard, sp

Invariant, checked when a policy is made: what is sharded on the left is sharded on the right. That inclusion is the
ladder of stages; it is why a parameter's own slice can always be written from the optimizer's shard without
communication.

After ZeRO (arXiv:1910.02054), section 5. Different from the paper: the stages are rows of a table, not algorithms, and
offload is the third field of a placement.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from deepspeed.tiers import Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One kind of bytes: over which mesh dims it is sharded, on which tier it rests, in which dtype."""

    sharded_over: tuple[str, ...] = ()
    tier: Tier = Tier.DEVICE
    dtype: torch.dtype = torch.float32

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds a piece rather than the whole."""
        return bool(self.sharded_over)

    def bytes_per_rank(self, numel: int, shard_world_size: int) -> float:
        """Bytes that `numel` elements cost one rank, padding aside."""
        share = shard_world_size if self.is_sharded else 1
        return numel * self.dtype.itemsize / share


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroPolicy:
    """The three placements of one training run. `optimizer.dtype` is the dtype of master weights and moments."""

    parameters: Placement
    gradients: Placement
    optimizer: Placement

    def __post_init__(self) -> None:
        ladder = (self.parameters, self.gradients, self.optimizer)
        for inner, outer in itertools.pairwise(ladder):
            assert set(inner.sharded_over) <= set(outer.sharded_over), f"{inner} is sharded where {outer} is not"

    @property
    def has_separate_master(self) -> bool:
        """Whether the optimizer updates a copy in another dtype rather than the parameters' own memory."""
        return self.optimizer.dtype != self.parameters.dtype


SHARD_DIMS = ("dp_shard", "sp")
"""The mesh dims that ZeRO shards over; `dp_replicate` (HSDP, MiCS) only repeats it. Ranks that share a sequence hold the
same parameters, so they shard them too."""

_LADDER = ((), SHARD_DIMS)
_STAGES = {0: (0, 0, 0), 1: (0, 0, 1), 2: (0, 1, 1), 3: (1, 1, 1)}


def policy_of_stage(
    stage: int,
    *,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    master_dtype: torch.dtype = torch.float32,
    param_tier: Tier = Tier.DEVICE,
    optimizer_tier: Tier = Tier.DEVICE,
) -> ZeroPolicy:
    """The policy of a ZeRO stage: parameters in `param_dtype`, gradients in `grad_dtype` (default: the same).

    Gradients rest where the optimizer's state does, because that is where they are read.
    """
    parameters, gradients, optimizer = (_LADDER[i] for i in _STAGES[stage])
    return ZeroPolicy(
        parameters=Placement(sharded_over=parameters, tier=param_tier, dtype=param_dtype),
        gradients=Placement(sharded_over=gradients, tier=optimizer_tier, dtype=grad_dtype or param_dtype),
        optimizer=Placement(sharded_over=optimizer, tier=optimizer_tier, dtype=master_dtype),
    )
