"""A hook on a parameter's gradient that runs after the script's own, whenever those were registered.

Made by the reducer, one per trained parameter, which takes the gradient away: a hook that came later would see None where
plain PyTorch shows it a gradient, and what it edits would be lost.

Torch calls hooks in the order of their dictionary, from a list made before the first of them. So a hook that finds others
behind it moves itself to the end, and is *early* this once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn


@final
class LastHook:
    """Calls `take(param)` after the other post-accumulate hooks of `param`; `take_early(param)` where some are yet to run."""

    __slots__ = ("_handle", "_hooks", "_take", "_take_early")

    def __init__(
        self, param: nn.Parameter, take: Callable[[nn.Parameter], None], take_early: Callable[[nn.Parameter], None]
    ) -> None:
        self._take, self._take_early = take, take_early
        self._handle = param.register_post_accumulate_grad_hook(self)
        self._hooks: dict[int, Any] = param._post_accumulate_grad_hooks

    def __call__(self, param: nn.Parameter) -> None:
        if len(self._hooks) == 1 or next(reversed(self._hooks)) == self._handle.id:
            self._take(param)
            return
        self._hooks[self._handle.id] = self._hooks.pop(self._handle.id)
        self._take_early(param)

    def remove(self) -> None:
        """Take it off the parameter."""
        self._handle.remove()
