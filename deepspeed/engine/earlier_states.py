"""States of an optimizer that stepped, or loaded a state dict, before `deepspeed.initialize`: they go on in what ZeRO steps.

Called by `engine.build` around the wrapping of the optimizer: `take` before it, while parameters are plain and already this
rank's parts of layers, `give` after it. The way of values into runs is that of a loaded checkpoint (`zero.checkpoint_flats`).

Invariant: a parameter's states go on or, where they are not one number for each of its elements or a number for all, begin anew,
with a warning that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.mesh import Mesh
from deepspeed.optim.traits import AveragesItself
from deepspeed.utils.logging import warn_once
from deepspeed.zero.checkpoint_flats import OPTIM, StateSpec, renew_states
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import full_shape


@dataclass(frozen=True)
class Earlier:
    """One parameter's state: values of its shape, flat and real, what there is besides, and its own dtype."""

    flat: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    dtype: torch.dtype


def take(optimizer: torch.optim.Optimizer | None, module: nn.Module) -> dict[str, Earlier]:
    """By name, the states that an optimizer has of the model's parameters, and then has no more."""
    if optimizer is None or not optimizer.state or isinstance(optimizer, AveragesItself):
        return {}
    found, anew = {}, []
    for name, param in module.named_parameters():
        state = optimizer.state.get(param)
        if not state:
            continue
        flat: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for key, value in state.items():
            is_like = isinstance(value, Tensor) and value.dim() > 0 and value.shape == full_shape(param)
            (flat if is_like else rest)[key] = value
        if any(isinstance(value, Tensor) and value.dim() > 0 for value in rest.values()):
            anew.append(name)
            continue
        real = {k: (torch.view_as_real(v) if v.is_complex() else v).reshape(-1) for k, v in flat.items()}
        found[name] = Earlier(real, rest, param.dtype.to_real())
    if anew:
        warn_once(
            f"{type(optimizer).__name__} has stepped before deepspeed.initialize: its states of {anew[0]}"
            f"{f' and {len(anew) - 1} more' if len(anew) > 1 else ''} are not one number for each element, and begin anew."
        )
    if found or anew:  # else they are of another engine's runs, which `zero.runs` tells of
        optimizer.state.clear()
    return found


def give(states: Mapping[str, Earlier], optimizer: ZeroOptimizer, mesh: Mesh) -> None:
    """Lay taken states into the runs that this rank steps. Not collective."""
    if not states:
        return
    specs = {
        name: StateSpec({OPTIM + key: value.dtype for key, value in state.flat.items()}, state.rest, _signature(state))
        for name, state in states.items()
    }
    with torch.no_grad():
        for flat in renew_states(optimizer, mesh, specs, {name: state.dtype for name, state in states.items()}):
            for span in flat.spans:
                value = states[span.name].flat[flat.kind.removeprefix(OPTIM)]
                flat.write(span.at, value[span.in_param : span.in_param + span.numel].cpu())
        optimizer.states_loaded()


def _signature(state: Earlier) -> str:
    return repr((sorted((key, str(value.dtype)) for key, value in state.flat.items()), sorted(state.rest.items())))
