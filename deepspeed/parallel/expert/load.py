"""How evenly experts are used: tokens per expert of one layer, since somebody last asked.

Filled by `dispatch` and `layer` with tensors that stay on the device; read by the step report, which makes numbers of
them when it makes a line, so that nothing waits for the device in between.
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
    dropped: Tensor | None = None
    """[] choices that no expert took."""
    auxiliary: Tensor | None = None
    """[] the last auxiliary loss."""
    is_watched: bool = False
    """Whether anybody asks; nothing is counted otherwise."""

    @torch.no_grad()
    def add(self, counts: Tensor, num_choices: int) -> None:
        """Count one forward: tokens per expert, of `num_choices` that were made."""
        if not self.is_watched:
            return
        dropped = num_choices - counts.sum()
        self.counts = counts.clone() if self.counts is None else self.counts + counts
        self.dropped = dropped if self.dropped is None else self.dropped + dropped

    def take(self) -> tuple[Tensor, Tensor] | None:
        """(counts, dropped) since the last call, which begins anew; None without a forward."""
        found = (self.counts, self.dropped) if self.counts is not None and self.dropped is not None else None
        self.counts = self.dropped = None
        return found
