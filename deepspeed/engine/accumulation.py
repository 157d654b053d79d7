"""Which micro-batch is the last of a step. Pure state, shared by the engine (counts) and the reducer (asks).

Two regimes drive the engine: its own count of `step()` calls (plain loops, Lightning), and a flag set before each
backward with `step()` at boundaries only (Accelerate, Transformers). Unmanaged accumulation makes every `step()` a
boundary.

A step's number of micro-batches is fixed when it begins: another one asked for on the way (`ask_for`) holds from the next
step on, so that no step is divided by one number and ended by another.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Accumulation:
    """Micro-batches of a step. `num_micro_batches` is that of the step under way; `asked` that of the next."""

    num_micro_batches: int
    is_managed: bool = True
    override: bool | None = None
    """What `set_gradient_accumulation_boundary` said last; None: nothing yet."""
    is_stepping: bool = False
    no_sync_depth: int = 0
    asked: int = field(init=False)
    micro_steps: int = field(default=0, init=False)
    """Calls of `step()` so far."""
    _num_done: int = field(default=0, init=False)
    """Of those, the ones that belong to the step under way."""

    def __post_init__(self) -> None:
        self.asked = self.num_micro_batches

    @property
    def is_boundary(self) -> bool:
        """Whether the current micro-batch completes a step."""
        if not self.is_managed:
            return self.is_stepping
        if self.override is not None:
            return self.override
        return self._num_done + 1 >= self.num_micro_batches

    def should_reduce(self) -> bool:
        """Whether gradients that rest replicated leave the rank in this backward."""
        return self.no_sync_depth == 0 and self.is_boundary

    def ask_for(self, num_micro_batches: int, *, is_under_way: bool) -> None:
        """Change the number: now if no micro-batch of the step under way was begun, else from the next step on."""
        self.asked = num_micro_batches
        if not is_under_way and not self._num_done:
            self.num_micro_batches = num_micro_batches

    def count(self, ended_step: bool) -> None:
        """A micro-batch was stepped."""
        self.micro_steps += 1
        self._num_done = 0 if ended_step else self._num_done + 1
        if ended_step:
            self.num_micro_batches = self.asked

    def set_micro_steps(self, count: int) -> None:
        """Go on from another count, as if every step so far had had as many micro-batches as the next will."""
        self.micro_steps = count
        self.num_micro_batches = self.asked
        self._num_done = count % self.asked
