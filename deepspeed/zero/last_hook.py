"""A hook on a parameter's gradient that runs after the script's own, whenever those were registered.

Made by the reducer, one per trained parameter, which takes the gradient away: a hook that came later would see None where
plain PyTorch shows it a gradient, and what it edits would be lost.

Torch calls hooks in the order of their dictionary, from a list made before the first of them. So a hook that finds others
behind it moves itself to the end, and is *early* this once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

from torch import Tensor, nn

from deepspeed.zero.gradients import Gradients


class Taker(Protocol):
    """Who takes gradients: the reducer."""

    is_plain: bool
    """Whether nothing but counting is to be done when a gradient arrives."""

    def take(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """`param`, number `index` of its bucket, has its gradient, and every other hook has seen it."""

    def begin_bucket(self) -> None:
        """The first gradient of a bucket is about to be counted."""

    def fill(self, gradients: Gradients) -> None:
        """A bucket has all of its gradients."""

    def take_early(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """The same, but other hooks are yet to run."""


@final
class LastHook:
    """Tells `taker` of parameter number `index` of a bucket, after the other post-accumulate hooks of the parameter."""

    __slots__ = ("_handle",)

    def __init__(self, taker: Taker, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        self._handle = param.register_post_accumulate_grad_hook(_nothing)
        hooks: dict[int, Any] = param._post_accumulate_grad_hooks
        hooks[self._handle.id] = _hook(taker, gradients, index, hooks, self._handle.id)

    def remove(self) -> None:
        """Take it off the parameter."""
        self._handle.remove()


def _nothing(param: Tensor) -> None:
    """Keeps a place among the hooks until its number is known."""


def _hook(
    taker: Taker, gradients: Gradients, index: int, hooks: dict[int, Any], number: int
) -> Callable[[nn.Parameter], None]:
    """The hook itself: a plain function with what it needs around it, which takes a fifth less than an object with attributes."""
    arrivals = gradients.arrivals

    def hook(param: nn.Parameter) -> None:
        """Once per parameter, between autograd's nodes: the usual case without another call, which is half of its time."""
        if len(hooks) != 1 and next(reversed(hooks)) != number:
            hooks[number] = hooks.pop(number)
            taker.take_early(gradients, index, param)
            return
        if not taker.is_plain or arrivals.waiting[index] is not None:
            taker.take(gradients, index, param)
            return
        gradient = param.grad
        if gradient is None:  # autograd calls the hook for a function that gave this parameter nothing, too
            return
        param.grad = None
        if not arrivals.num_here:
            taker.begin_bucket()
        arrivals.waiting[index] = gradient
        arrivals.num_here += 1
        if arrivals.num_here == arrivals.num_params and not arrivals.awaits_parts(gradients.bucket.params):
            taker.fill(gradients)

    return hook
