"""Where a layer's experts are: how many, over which ranks, which of them here.

Held by every layer with experts; filled in by `attach` when an engine is made, until when all experts are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deepspeed.parallel.expert.capacity import num_local
from deepspeed.parallel.expert.load import Load
from deepspeed.parallel.expert.times import Times

PLACE = "ds_expert_place"
"""Attribute of a module whose experts are spread: its `ExpertPlace`."""


@dataclass(eq=False)
class ExpertPlace:
    """Experts [first, first + num_here) of `num_experts` are on this rank, number `rank` of `size` in `group`."""

    num_experts: int
    size: int = 1
    rank: int = 0
    group: Any = None
    number: int = 0
    """The layer's number in its model, which ranks compare before they exchange tokens."""
    load: Load = field(default_factory=Load)
    times: Times = field(default_factory=Times)
    wait_for: Callable[[Any], None] | None = None
    """Waits for an exchange in another way than by its own `wait`, if anybody knows one."""

    def run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A collective over the group, which has ended when this returns (on a device: for its stream)."""
        if self.wait_for is None:
            operation(*args, group=self.group, **kwargs)
        else:
            self.wait_for(operation(*args, group=self.group, async_op=True, **kwargs))

    @property
    def num_here(self) -> int:
        """Experts on this rank."""
        return num_local(self.num_experts, self.size)

    @property
    def first(self) -> int:
        """The global number of this rank's first expert."""
        return self.rank * self.num_here

    def __deepcopy__(self, memo: Any) -> ExpertPlace:
        """A copied layer has the same ranks; process groups cannot be copied."""
        return ExpertPlace(self.num_experts, self.size, self.rank, self.group, self.number)
