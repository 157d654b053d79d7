"""`engine.compile`: the whole model, or at stage 3 each unit for itself, because parameters come and go between units.

A unit's `forward` is replaced in its instance dict; `detach_hooks` puts back what stood there, with the hooks of stage 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepspeed.zero.hooks import ModuleHooks

UNCOMPILED = "_uncompiled_forward"
"""Where a unit that `compile` changed keeps the `forward` it had of its own, if any."""


def compile_model(model: nn.Module, hooks: ModuleHooks | None, **kwargs: Any) -> None:
    """Compile in place, with the keywords of torch.compile."""
    if hooks is None:
        model.compile(**kwargs)
        return
    for unit, buckets in hooks.users.items():
        if buckets and unit is not model:
            unit.__dict__[UNCOMPILED] = unit.__dict__.get("forward")
            unit.forward = torch.compile(unit.forward, **kwargs)


def detach_hooks(hooks: ModuleHooks) -> None:
    """Take the hooks away, and what `compile` put in place of the units' forward."""
    hooks.detach()
    for module in hooks.users:
        if UNCOMPILED in module.__dict__:
            del module.__dict__["forward"]
            own = module.__dict__.pop(UNCOMPILED)
            if own is not None:
                module.forward = own
