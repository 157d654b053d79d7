"""Hooks on an optimizer's `step` (`register_step_pre_hook`, `register_step_post_hook`): called once per step that is not skipped.

Used by `zero.optimizer`. Torch calls them around each call of the wrapped optimizer's `step`, of which there may be several in
one of ours, one per sub-group or tile, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
TORCH_HOOKS = (
    *STEP_HOOKS,
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Where torch.optim.Optimizer keeps them; its `register_...` methods read these."""


@contextlib.contextmanager
def called_once(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Call the hooks on `optimizer` before and after what is inside, and none in between. What they are given for arguments is
    empty, as in a `step()` without a closure, and what they return is not used."""
    before, after = (vars(optimizer).get(name) or {} for name in STEP_HOOKS)
    if not before and not after:
        yield
        return
    for hook in list(before.values()):
        hook(optimizer, (), {})
    kept = {name: vars(optimizer)[name] for name in STEP_HOOKS if name in vars(optimizer)}
    vars(optimizer).update({name: type(hooks)() for name, hooks in kept.items()})
    try:
        yield
    finally:
        vars(optimizer).update(kept)
    for hook in list(after.values()):
        hook(optimizer, (), {})
