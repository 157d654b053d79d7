"""How evenly experts are used: tokens per expert of one layer, since somebody last asked.

Filled by `dispatch` and `layer` with tensors that stay on the device; read by the step report (`engine.expert_load`), which
makes numbers of them when it makes a line, so that nothing waits for the device in between.

Invariant: a forward counts once. What activation checkpointing runs again in a backward is no new choice of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Load:
    """Sums since `take`."""

    counts: Tensor | None = None
    """[experts] tokens of this rank that went to each."""
    chosen: Tensor | None = None
    """[] choices that were made; those that no expert took are dropped."""
    auxiliary: Tensor | None = None
    """[] the last auxiliary loss."""
    is_watched: bool = False
    """Whether anybody asks; nothing is counted otherwise."""
    awaits_use: bool = False
    """Whether it is still to be seen if the auxiliary loss becomes part of the loss."""
    was_made: bool = False
    """An auxiliary loss that could train the gate was handed out ..."""
    was_used: bool = False
    """... and a gradient came to one."""

    @torch.no_grad()
    def add(self, counts: Tensor, chosen: Tensor) -> None:
        """Count one forward: tokens per expert, of `chosen` [] or [experts] choices that were made."""
        if not self.is_watched or torch._C._current_autograd_node() is not None:
            return
        self.counts = counts.clone() if self.counts is None else self.counts + counts
        self.chosen = chosen.sum() if self.chosen is None else self.chosen + chosen.sum()

    def note_auxiliary(self, l_aux: Tensor) -> None:
        """An auxiliary loss is handed out."""
        self.auxiliary = l_aux.detach()
        if self.awaits_use and l_aux.requires_grad:
            self.was_made = True
            l_aux.register_hook(self._note_use)

    def _note_use(self, _: Tensor) -> None:
        self.was_used = True

    def take(self) -> tuple[Tensor, Tensor] | None:
        """(counts, choices) since the last call, which begins anew; None without a forward."""
        found = (self.counts, self.chosen) if self.counts is not None and self.chosen is not None else None
        self.counts = self.chosen = None
        return found
