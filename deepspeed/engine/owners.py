"""Which live engine a model belongs to: a model, and a parameter, has one at a time.

Asked by an engine before it builds, told when it is done. Knows an engine as an `Owner`, weakly: what is noted here
keeps neither model nor engine alive.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn

from deepspeed.utils.logging import logger
from deepspeed.zero.build import Built


class Owner(Protocol):
    """An engine, as far as others have to know it."""

    module: nn.Module
    _finalizer: weakref.finalize[Any, Any]
    """Dead once it was destroyed."""
    _built: Built

    def destroy(self) -> None:
        """Give the model free."""


_owner_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()
"""Of the whole process, because any two engines could meet; an entry goes with its model."""


def note_owner(model: nn.Module, owner: Owner) -> None:
    """The model belongs to this engine from now on."""
    _owner_of[model] = weakref.ref(owner)


def forget_owner(model: nn.Module) -> None:
    """The model belongs to nobody."""
    _owner_of.pop(model, None)


def take_over(model: nn.Module) -> None:
    """End the engine that a model belongs to, whose hooks would run beside the new one's: Lightning makes an engine to
    train and another to test, TRL one to score and another to train, and neither ends the first."""
    previous = _owner_of.get(model, lambda: None)()
    if previous is not None:
        logger.info("the model of a live DeepSpeedEngine is given to a new one; the earlier engine is destroyed.")
        previous.destroy()


def shared_with_another(model: nn.Module) -> str | None:
    """Why a model cannot have an engine: another live one manages some of its parameters. One whose parameters are all in
    this model is ended instead, as by a new engine on the same model: the script wrapped it."""
    params = {param: name for name, param in model.named_parameters()}
    for reference in list(_owner_of.values()):
        other = reference()
        if other is None or other._finalizer.peek() is None or other.module is model:
            continue
        managed = [param for bucket in other._built.buckets for param in bucket.params]
        shared = [param for param in managed if param in params]
        if shared and len(shared) == len(managed):
            logger.info("the model of a live DeepSpeedEngine is part of a new one's; the earlier engine is destroyed.")
            other.destroy()
        elif shared:
            return (
                f"{params[shared[0]]}{f' and {len(shared) - 1} more' if shared[1:] else ''} of this {type(model).__name__} "
                f"belong to another live engine (of a {type(other.module).__name__}): each would move them into buckets of its "
                "own.\n  Make one engine of one module that holds both models, with a parameter group for each; or end the other "
                "first with engine.destroy()."
            )
    return None
