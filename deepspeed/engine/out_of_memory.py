"""What to say when memory runs out: what holds most of it, and the one setting that would help most.

The phases of the step (`engine.step`) give their errors to `MemoryAdvice.raise_explained`. The advice is read from the bytes at
rest by kind; what an allocator has handed out beyond those is the computation's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.config import Config
from deepspeed.engine.at_rest import AtRest
from deepspeed.utils.logging import current_rank

GIB = 2**30
_CPU_MESSAGE = "DefaultCPUAllocator"
"""How torch's CPU allocator signs its errors, which have no class of their own."""


@dataclass(frozen=True)
class MemoryAdvice:
    """Knows what rests where, and what the configuration could still do about it."""

    at_rest: AtRest
    config: Config
    num_ranks: int
    """Data-parallel ranks."""

    def raise_explained(self, error: RuntimeError, when: str) -> None:
        """If memory ran out: raise it again with what holds the memory, and what to change. Else return."""
        if isinstance(error, torch.OutOfMemoryError) or _CPU_MESSAGE in str(error):
            raise torch.OutOfMemoryError(f"{error}\n{self.explain(when)}") from error

    def explain(self, when: str) -> str:
        """The message: memory by kind, the largest first, and one change."""
        kinds = self.at_rest.by_kind()
        if get_accelerator().device_name() != "cpu":
            kinds["activations and buffers"] = max(0, get_accelerator().memory_allocated() - sum(kinds.values()))
        largest = max(kinds, key=lambda kind: kinds[kind])
        by_size = sorted(kinds.items(), key=lambda pair: -pair[1])
        sizes = ", ".join(f"{kind} {n / GIB:.2f} GiB" for kind, n in by_size if n)
        return (
            f"[rank {current_rank()}] out of memory in {when}. Largest: {largest} (of {sizes}).\n"
            f"  {self._cure(largest)} `deepspeed estimate` shows what each setting would need."
        )

    def _cure(self, largest: str) -> str:
        needed = {"optimizer": 1, "gradients": 2, "parameters": 3}.get(largest, 0)
        if self.config.zero_optimization.stage < needed and self.num_ranks > 1:
            return f'Set "zero_optimization": {{"stage": {needed}}}: each rank then keeps 1/{self.num_ranks} of it.'
        if largest == "unsharded":
            return "Lower zero_optimization.stage3_max_live_parameters."
        section = {
            "optimizer": "offload_optimizer",
            "gradients": "offload_optimizer",
            "parameters": "offload_param",
        }.get(largest)
        if section is not None:
            return f'Set zero_optimization.{section} = {{"device": "cpu"}}.'
        if self.config.activation_checkpointing.recompute != "full":
            return 'Set "activation_checkpointing": {"recompute": "full"}, or memory_budget_gb to have it chosen.'
        return "Lower train_micro_batch_size_per_gpu, and raise gradient_accumulation_steps."
