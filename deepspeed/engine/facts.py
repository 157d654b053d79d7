"""What the engine tells those who watch it: how far the run is, what a step gave, what the run is.

On the floor of the engine's folder: imports nothing of it. Made by the engine, read by observers, which therefore need
no engine and hold none; a second engine that steps in another manner makes the same facts.

Invariant: facts are frozen and hold numbers and names, no tensors and no engine, so who keeps them keeps nothing alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.utils.schedule import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """One optimizer step, over and counted."""

    progress: Progress
    was_applied: bool
    """False where the gradients overflowed, so that no weight changed."""
    lr: tuple[float, ...]
    """Per parameter group, as the next step will use it."""
    grad_norm: float | None
    """Of the averaged gradients, before clipping."""
    loss_scale: float
    micro_batch_size: int
    """Samples per rank and micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is trained, and how; does not change after the engine was built."""

    model: str
    num_parameters: int
    zero_stage: int
    num_ranks: int
    """Data-parallel ranks."""
    divided: str
    """How many ranks share layers, sequences, experts, or are stages; empty where none do."""
    dtype: str
    """That matrix products run in."""
    optimizer: str | None
    train_batch_size: int
    micro_batch_size: int
    accumulation: int
