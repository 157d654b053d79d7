"""Which micro-batch is the last of a step. Pure state, shared by the engine (counts) and the reducer (asks).

Two regimes drive the engine: its own count of `step()` calls (plain loops, Lightning), and a flag set before each
backward with `step()` at boundaries only (Accelerate, Transformers). Unmanaged accumulation makes every `step()` a
boundary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Accumulation:
    """Micro-batches of a step. `num_micro_batches` is `gradient_accumulation_steps`."""

    num_micro_batches: int
    is_managed: bool = True
    micro_steps: int = 0
    """Calls of `step()` so far."""
    override: bool | None = None
    """What `set_gradient_accumulation_boundary` said last; None: nothing yet."""
    is_stepping: bool = False
    no_sync_depth: int = 0

    @property
    def is_boundary(self) -> bool:
        """Whether the current micro-batch completes a step."""
        if not self.is_managed:
            return self.is_stepping
        if self.override is not None:
            return self.override
        return (self.micro_steps + 1) % self.num_micro_batches == 0

    def should_reduce(self) -> bool:
        """Whether gradients that rest replicated leave the rank in this backward."""
        return self.no_sync_depth == 0 and self.is_boundary
