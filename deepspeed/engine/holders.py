"""What libraries still hold of an engine that has ended: the Trainer's wrapped model, Accelerate's wrapped optimizer.

Called where an engine is destroyed or made. Transformers' Trainer has Accelerate destroy its engine at the beginning of
each `train()`, and goes on with it: what the Trainer wrapped is the engine, so no new one would be made, and an optimizer of the
Trainer's own making is the one inside of the engine's. So an engine that ends puts its model in its place there, as
the Trainer itself does where it looks for a batch size, and an optimizer that was in an ended engine is taken out of it.

Invariant: nothing but these two is touched, and nothing of a library that was not imported.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from deepspeed.engine.owners import Owner
from deepspeed.zero.optimizer import ZeroOptimizer

_HOLDS = "model_wrapped"


def give_back(engine: Owner) -> None:
    """Have every Trainer of Transformers that holds a destroyed engine hold its model."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return
    for holder in gc.get_referrers(engine):
        if isinstance(holder, module.Trainer) and getattr(holder, _HOLDS, None) is engine:
            setattr(holder, _HOLDS, engine.module)
        elif isinstance(holder, dict) and holder.get(_HOLDS) is engine:
            holder[_HOLDS] = engine.module


def innermost(optimizer: Any) -> Any:
    """The optimizer that an engine's optimizer wraps, where one is handed to another engine; any other as it is."""
    inner = optimizer
    while isinstance(inner, torch.optim.Optimizer):
        if isinstance(inner, ZeroOptimizer):
            return inner.optimizer
        inner = getattr(inner, "optimizer", None)
    return optimizer
