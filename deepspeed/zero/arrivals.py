"""What autograd has given for one bucket: the gradients that wait to be laid down, and who had one in this step.

Filled by the reducer's hooks, one `take` per parameter; emptied by `zero.gradients`, which lays it into a flat buffer. Pure
bookkeeping: nothing here knows of ranks or placements.

Invariant: a gradient is owned by exactly one place, autograd's tensor here or the flat buffer there, never by both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Arrivals:
    """The gradients of one bucket's `num_params` parameters since they were last laid down."""

    def __init__(self, num_params: int) -> None:
        self._num_params = num_params
        self._tensors: list[Tensor | None] = [None] * num_params
        self._num_here = 0
        self._num_missing = num_params
        self._is_ready = [False] * num_params
        self.used: set[int] = set()
        """Parameters that had a gradient in this step."""

    @property
    def has_any(self) -> bool:
        """Whether gradients wait to be laid down."""
        return self._num_here > 0

    @property
    def misses_any(self) -> bool:
        """Whether a parameter had no gradient on this rank in this step."""
        return len(self.used) < self._num_params

    def has(self, index: int) -> bool:
        """Whether a parameter's gradient waits to be laid down."""
        return self._tensors[index] is not None

    def take(self, index: int, gradient: Tensor, is_ready: bool = True) -> bool:
        """Take a gradient over, or add it to the one that waits; whether it completed the bucket.

        One that is not ready is a part: the parameter counts as arrived with the part that is (`ds_grad_is_ready`).
        """
        before = self._tensors[index]
        self._tensors[index] = gradient if before is None else before + gradient
        self._num_here += before is None
        if not is_ready or self._is_ready[index]:
            return False
        self._is_ready[index] = True
        self._num_missing -= 1
        return self._num_missing == 0

    def lay_into(self, views: Sequence[Tensor], adds: bool) -> None:
        """Write what waits into the parameters' views, or add it. Unless it adds, what did not arrive becomes zero."""
        here = [i for i, tensor in enumerate(self._tensors) if tensor is not None]
        gradients = [tensor for tensor in self._tensors if tensor is not None]
        targets = [views[i] for i in here]
        if gradients and adds:
            torch._foreach_add_(targets, gradients)
        elif gradients:
            torch._foreach_copy_(targets, gradients)
        if not adds and len(here) < self._num_params:
            torch._foreach_zero_([view for i, view in enumerate(views) if self._tensors[i] is None])
        self.used.update(here)
        self.forget()

    def forget(self) -> None:
        """Let go of what waits."""
        self._tensors = [None] * self._num_params
        self._is_ready = [False] * self._num_params
        self._num_here, self._num_missing = 0, self._num_params
