"""What autograd has given for one bucket: the gradients that wait to be laid down, and who had one in this step.

Filled by the reducer's hooks, one `take` per parameter; emptied by a bucket's `zero.gradients`, which lays it into a flat buffer. Pure
bookkeeping: nothing here knows of ranks or placements.

Invariant: a gradient is owned by exactly one place, autograd's tensor here or the flat buffer there, never by both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import final

import torch
from torch import Tensor, nn

READY = "ds_grad_is_ready"
"""Attribute by which code that runs several backward passes per parameter says which of them is the last."""


_is_sparse = attrgetter("is_sparse")


@final
class Arrivals:
    """The gradients of one bucket's parameters since they were last laid down."""

    __slots__ = ("_all", "_parts", "num_here", "num_params", "rows", "used", "waiting")

    def __init__(self, num_params: int) -> None:
        self.num_params = num_params
        self.waiting: list[Tensor | None] = [None] * num_params
        """By parameter, what waits. `zero.last_hook` fills it in place, and counts, where `take` would do no more than that."""
        self.num_here = 0
        """Of how many parameters a gradient waits to be laid down."""
        self._all = frozenset(range(num_params))
        self._parts: set[int] = set()
        """Parameters of whose gradients more is to come; known where all have arrived."""
        self.used: set[int] = set()
        """Parameters that had a gradient in this step."""
        self.rows: dict[int, list[Tensor]] = {}
        """By parameter, the rows that this step's sparse gradients list, for an optimizer that steps no others."""

    @property
    def has_any(self) -> bool:
        """Whether gradients wait to be laid down."""
        return self.num_here > 0

    @property
    def misses_any(self) -> bool:
        """Whether a parameter had no gradient on this rank in this step."""
        return len(self.used) < self.num_params

    def has(self, index: int) -> bool:
        """Whether a parameter's gradient waits to be laid down."""
        return self.waiting[index] is not None

    def take(self, index: int, gradient: Tensor) -> bool:
        """Take a gradient over, or add it to the one that waits; whether that was the last one of the bucket, or may have been
        (`awaits_parts`). Runs once per parameter, between autograd's nodes: it touches as little memory as it can."""
        before = self.waiting[index]
        if before is not None:
            return self._add(index, before, gradient)
        self.waiting[index] = gradient
        self.num_here += 1
        return self.num_here == self.num_params

    def _add(self, index: int, before: Tensor, gradient: Tensor) -> bool:
        if not (before.is_sparse and gradient.is_sparse):
            self._note_rows([(index, before), (index, gradient)])
            before, gradient = _dense(before), _dense(gradient)
        self.waiting[index] = before + gradient
        if index not in self._parts:
            return False
        self._parts.discard(index)
        return not self._parts

    def awaits_parts(self, params: Sequence[nn.Parameter]) -> bool:
        """All have arrived: whether some arrived in part (`ds_grad_is_ready` is False), and are complete with one to come."""
        if any(map(contains, map(vars, params), repeat(READY))):  # of many parameters usually none
            self._parts.update(i for i, param in enumerate(params) if not param.__dict__.get(READY, True))
        return bool(self._parts)

    def end_step(self) -> None:
        """The next gradients are another step's."""
        self.used.clear()
        self.rows.clear()

    def lay_into(self, views: Sequence[Tensor], adds: bool) -> None:
        """Write what waits into the parameters' views, or add it. Unless it adds, what did not arrive becomes zero."""
        is_complete = self.num_here == self.num_params  # as nearly always
        here = self._all if is_complete else [i for i, t in enumerate(self.waiting) if t is not None]
        gradients = self._dense_ones()
        targets = list(views) if is_complete else [views[i] for i in here]
        if gradients and adds:
            torch._foreach_add_(targets, gradients)
        elif gradients:
            torch._foreach_copy_(targets, gradients)
        if not adds and len(here) < self.num_params:
            torch._foreach_zero_([view for i, view in enumerate(views) if self.waiting[i] is None])
        self.used.update(here)
        self.forget()

    def _dense_ones(self) -> list[Tensor]:
        gradients = [tensor for tensor in self.waiting if tensor is not None]
        if not any(map(_is_sparse, gradients)):
            return gradients
        self._note_rows((i, tensor) for i, tensor in enumerate(self.waiting) if tensor is not None)
        return list(map(_dense, gradients))

    def _note_rows(self, gradients: Iterable[tuple[int, Tensor]]) -> None:
        for index, gradient in gradients:
            if gradient.is_sparse:
                self.rows.setdefault(index, []).append(gradient._indices()[0])

    def forget(self) -> None:
        """Let go of what waits."""
        self.waiting = [None] * self.num_params
        self._parts.clear()
        self.num_here = 0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
