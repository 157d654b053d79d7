"""What changes as a run goes on: the protocol of a schedule, and the count that it follows.

On the floor, because schedules are made by features in many folders (`optim`, data, compression) and driven by the engine, which
keeps them (`engine/schedules.py`), saves them and resumes them.

Invariant: a schedule follows `Progress` and its own state, nothing that a resumed run would not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, at the end of a step."""

    global_steps: int
    """Optimizer steps, skipped ones among them."""
    global_samples: int
    """Samples over all ranks."""
    skipped_steps: int
    """Steps whose gradients overflowed."""


class Schedule(Protocol):
    """Something that is set anew at every step of a run: a sequence length, a share of tokens, a degree of pruning."""

    def step(self, progress: Progress, was_applied: bool) -> None:
        """A step is over, on every rank alike. `was_applied`: False where its gradients overflowed and no weight changed."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs, the same on every rank; None for nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be as the schedule was that gave `state`, in effect and not only in numbers."""


InputStep = Callable[[tuple[Any, ...], dict[str, Any], bool], tuple[tuple[Any, ...], Mapping[str, Any]]]
"""(arguments of forward, its keywords, whether the model is in training mode) -> both, changed."""

UpdateHook = Callable[[Progress], None]
"""Called after weights were updated and published, before the next forward."""
