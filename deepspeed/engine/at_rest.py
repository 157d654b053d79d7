"""Bytes that rest on this rank, by kind: what `memory_by_kind`, the progress line and out-of-memory errors tell.

Made by the engine over what it built; asked at any time between two phases.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deepspeed.zero.build import Built
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.reduce import Reducer


@dataclass(frozen=True)
class AtRest:
    """See the module's text."""

    module: nn.Module
    built: Built
    reducer: Reducer
    optimizer: ZeroOptimizer | None

    def by_kind(self) -> dict[str, int]:
        """Bytes on whatever tier: parameters, their unsharded copies, gradients, optimizer (masters and states)."""
        in_buckets = {id(param) for bucket in self.built.buckets for param in bucket.params}
        params = sum(bucket.nbytes for bucket in self.built.buckets)
        params += sum(p.nbytes for p in self.module.parameters() if id(p) not in in_buckets)
        return {
            "parameters": params,
            "unsharded": sum(bucket.unsharded_nbytes for bucket in self.built.buckets),
            "gradients": sum(gradients.nbytes for gradients in self.reducer.gradients),
            "optimizer": self.optimizer.nbytes if self.optimizer is not None else 0,
        }
