"""What to say when memory runs out: what holds most of it, and the one setting that would help most.

The engine puts `explained` around its forward, backward and step. The advice is read from the bytes at rest by kind; what
an allocator has handed out beyond those is the computation's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from deepspeed.accelerator import get_accelerator

if TYPE_CHECKING:
    from deepspeed.engine.engine import DeepSpeedEngine

GIB = 2**30
_CPU_MESSAGE = "DefaultCPUAllocator"
"""How torch's CPU allocator signs its errors, which have no class of their own."""


@contextlib.contextmanager
def explained(engine: DeepSpeedEngine, when: str) -> Iterator[None]:
    """Add to an out-of-memory error inside what holds the memory, and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\n{explain(engine, when)}") from error
    except RuntimeError as error:
        if _CPU_MESSAGE not in str(error):
            raise
        raise torch.OutOfMemoryError(f"{error}\n{explain(engine, when)}") from error


def explain(engine: DeepSpeedEngine, when: str) -> str:
    """The message: memory by kind, the largest first, and one change."""
    at_rest = engine.memory_by_kind()
    kinds = {kind: at_rest[kind] for kind in ("parameters", "unsharded", "gradients", "optimizer")}
    if get_accelerator().device_name() != "cpu":
        kinds["activations and buffers"] = max(0, get_accelerator().memory_allocated() - sum(kinds.values()))
    largest = max(kinds, key=lambda kind: kinds[kind])
    sizes = ", ".join(f"{kind} {n / GIB:.2f} GiB" for kind, n in sorted(kinds.items(), key=lambda pair: -pair[1]) if n)
    return (
        f"[rank {engine.global_rank}] out of memory in {when}. Largest: {largest} (of {sizes}).\n"
        f"  {_cure(engine, largest)} `deepspeed estimate` shows what each setting would need."
    )


def _cure(engine: DeepSpeedEngine, largest: str) -> str:
    stage = engine.zero_optimization_stage()
    needed = {"optimizer": 1, "gradients": 2, "parameters": 3}.get(largest, 0)
    if stage < needed and engine.dp_world_size > 1:
        return f'Set "zero_optimization": {{"stage": {needed}}}: each rank then keeps 1/{engine.dp_world_size} of it.'
    if largest == "unsharded":
        return "Lower zero_optimization.stage3_max_live_parameters."
    section = {"optimizer": "offload_optimizer", "gradients": "offload_optimizer", "parameters": "offload_param"}.get(
        largest
    )
    if section is not None:
        return f'Set zero_optimization.{section} = {{"device": "cpu"}}.'
    recompute = engine._config.activation_checkpointing.recompute
    if recompute != "full":
        return 'Set "activation_checkpointing": {"recompute": "full"}, or memory_budget_gb to have it chosen.'
    return "Lower train_micro_batch_size_per_gpu, and raise gradient_accumulation_steps."
