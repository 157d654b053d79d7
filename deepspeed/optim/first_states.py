"""States that a class of optimizers makes when it is constructed, for parameters that no step has seen yet.

Asked by `zero.checkpoint_flats` where a checkpoint has no state for a run, and by `checkpoint.load`, which tries a class on one element.

Most classes make a state in the first step that finds none. torch 2.6's Adagrad, and classes that are written after it,
make it in their constructor and take it for granted in every step: a state that is cleared there has to be made again.

Invariant: what is made here is what the constructor makes, with the settings that the group has now.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def alike(optimizer: torch.optim.Optimizer, param: nn.Parameter, group: int = 0) -> torch.optim.Optimizer:
    """A new optimizer of the class and with a group's settings, of one parameter. Raises what the constructor does."""
    settings = {key: optimizer.param_groups[group][key] for key in optimizer.defaults}
    return type(optimizer)([param], **settings)


def first_state(optimizer: torch.optim.Optimizer, param: nn.Parameter, group: int) -> dict[str, Any]:
    """What the constructor gives `param`: nothing for most classes, nor where the class takes other arguments than its
    groups' settings. Tried on one element before memory of the parameter's size is taken."""
    try:
        if not alike(optimizer, nn.Parameter(param.detach().new_zeros(1)), group).state:
            return {}
        return dict(alike(optimizer, param, group).state.get(param, {}))
    except TypeError:
        return {}
