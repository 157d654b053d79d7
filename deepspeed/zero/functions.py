"""Sharded parameters that a script gives to a `torch.autograd.Function`: gathered before torch looks at their shapes.

Attached and detached by `zero.hooks`. `apply` writes down what gradients its inputs will have before it calls the function's
forward, in which a use would be noticed: of a parameter outside of its own module (a fused head and loss, called with the
weight of the head) it would write down a gradient of no elements, which the backward then refuses. `apply` is reached by names that
scripts took at import, so what is replaced, while any model is attached, is the first thing that it calls with its arguments.

Invariant: where nobody gathers for the use, functions get what they were given; some gather by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import utils

from deepspeed.zero.param import ShardedParameter, gather_for

_original: Callable[[tuple[Any, ...]], tuple[Any, ...]] = utils.unwrap_dead_wrappers
_owners: list[object] = []
"""Models whose parameters are sharded."""


def attach(owner: object) -> None:
    """A model's parameters are sharded from now on."""
    _owners.append(owner)
    utils.unwrap_dead_wrappers = _gathered


def detach(owner: object) -> None:
    """They are not."""
    _owners[:] = [other for other in _owners if other is not owner]
    if not _owners:
        utils.unwrap_dead_wrappers = _original  # type: ignore[assignment]


def _gathered(args: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in args:
        if type(value) is ShardedParameter:
            gather_for(value, torch.autograd.Function.apply)
    return _original(args)
