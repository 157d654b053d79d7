"""What autograd has given for one bucket: taken by a hook per parameter, kept until it is laid down.

The hooks (`LastHook`) are made by the reducer, one per trained parameter, and fill the bucket's `Arrivals`; a bucket's
`zero.gradients` lays them into a flat buffer. Nothing here knows of ranks or placements.

A hook takes the gradient away: one that came later would see None where plain PyTorch shows it a gradient, and what it edits
would be lost. So ours runs after the script's own, whenever those were registered. Torch calls hooks in the order of their
dictionary, from a list made before the first of them: a hook that finds others behind it moves itself to the end, and is
*early* this once.

Invariant: a gradient is owned by exactly one place, autograd's tensor here or the flat buffer there, never by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

READY = "ds_grad_is_ready"
"""Attribute by which code that runs several backward passes per parameter says which of them is the last."""


_is_sparse = attrgetter("is_sparse")


@final
class Arrivals:
    """The gradients of one bucket's parameters since they were last laid down."""

    __slots__ = ("_all", "_attributes", "_params", "_parts", "num_here", "num_params", "rows", "used", "waiting")

    def __init__(self, num_params: int) -> None:
        self.num_params = num_params
        self.waiting: list[Tensor | None] = [None] * num_params
        """By parameter, what waits; the same list for life. `LastHook` fills it, and counts, where `take` would do no more."""
        self.num_here = 0
        """Of how many parameters a gradient waits to be laid down."""
        self._all = frozenset(range(num_params))
        self._params: Sequence[nn.Parameter] = ()
        self._attributes: list[dict[str, Any]] = []
        """The `__dict__` of each of `_params`, the same object for life: making the list takes seven times as long as reading it."""
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
        if params is not self._params:
            self._params, self._attributes = params, list(map(vars, params))
        if any(map(contains, self._attributes, repeat(READY))):  # of many parameters usually none
            self._parts.update(i for i, known in enumerate(self._attributes) if not known.get(READY, True))
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
        self.waiting[:] = repeat(None, self.num_params)
        self._parts.clear()
        self.num_here = 0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


class HasParameters(Protocol):
    """A bucket."""

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """Its parameters."""
        ...


class HasArrivals(Protocol):
    """A bucket's gradients (`zero.gradients.Gradients`)."""

    arrivals: Arrivals

    @property
    def bucket(self) -> HasParameters:
        """Whose they are."""
        ...


G = TypeVar("G", bound=HasArrivals)
G_contra = TypeVar("G_contra", bound=HasArrivals, contravariant=True)


class Taker(Protocol[G_contra]):
    """Who takes gradients: the reducer."""

    is_plain: bool
    """Whether nothing but counting is to be done when a gradient arrives."""

    def take(self, gradients: G_contra, index: int, param: nn.Parameter) -> None:
        """`param`, number `index` of its bucket, has its gradient, and every other hook has seen it."""

    def begin_bucket(self) -> None:
        """The first gradient of a bucket is about to be counted."""

    def fill(self, gradients: G_contra) -> None:
        """A bucket has all of its gradients."""

    def take_early(self, gradients: G_contra, index: int, param: nn.Parameter) -> None:
        """The same, but other hooks are yet to run."""


@final
class LastHook:
    """Tells `taker` of parameter number `index` of a bucket, after the other post-accumulate hooks of the parameter."""

    __slots__ = ("_handle",)

    def __init__(self, taker: Taker[G], gradients: G, index: int, param: nn.Parameter) -> None:
        self._handle = param.register_post_accumulate_grad_hook(_nothing)
        hooks: dict[int, Any] = param._post_accumulate_grad_hooks
        hooks[self._handle.id] = _hook(taker, gradients, index, hooks, self._handle.id)

    def remove(self) -> None:
        """Take it off the parameter."""
        self._handle.remove()


def _nothing(param: Tensor) -> None:
    """Keeps a place among the hooks until its number is known."""


def _hook(
    taker: Taker[G], gradients: G, index: int, hooks: dict[int, Any], number: int
) -> Callable[[nn.Parameter], None]:
    """The hook itself: a plain function with what it needs around it, which takes a fifth less than an object with attributes."""
    arrivals = gradients.arrivals
    waiting, num_params = arrivals.waiting, arrivals.num_params

    def hook(param: nn.Parameter) -> None:
        """Once per parameter, between autograd's nodes: the usual case without another call, which is half of its time."""
        if len(hooks) != 1 and next(reversed(hooks)) != number:
            hooks[number] = hooks.pop(number)
            taker.take_early(gradients, index, param)
            return
        if not taker.is_plain or waiting[index] is not None:
            taker.take(gradients, index, param)
            return
        gradient = param.grad
        if gradient is None:  # autograd calls the hook for a function that gave this parameter nothing, too
            return
        param.grad = None
        waiting[index] = gradient
        num_here = arrivals.num_here = arrivals.num_here + 1
        if num_here == 1:
            taker.begin_bucket()
        if num_here == num_params and not arrivals.awaits_parts(gradients.bucket.params):
            taker.fill(gradients)

    return hook
