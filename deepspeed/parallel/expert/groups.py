"""Optimizer groups of experts, by the functions of the public contract (`deepspeed.moe.utils`).

Called by scripts that bring an optimizer of their own, and by the engine when it makes one. Here experts have buckets of
their own whatever the groups are; the groups are what learning rates, decay and other libraries see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.parallel.expert.layer import MoE
from deepspeed.utils.errors import DeepSpeedError

MAX_GROUP_NUMEL = 178956971


def is_moe_param(param: Any) -> bool:
    """Whether a parameter belongs to an expert: it is marked with `allreduce` False."""
    return getattr(param, "allreduce", True) is False


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a model has `MoE` layers, and how many experts the first has."""
    found = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return found is not None, found.num_experts if found is not None else 0


def split_params_into_shared_and_expert_params(params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(others, those of experts)."""
    every = list(params)
    return [p for p in every if not is_moe_param(p)], [p for p in every if is_moe_param(p)]


def split_params_grads_into_shared_and_expert_params(group: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of (others, those of experts), of parameters that have one."""
    shared, expert = split_params_into_shared_and_expert_params(p for p in group if p.grad is not None)
    return [p.grad for p in shared if p.grad is not None], [p.grad for p in expert if p.grad is not None]


def is_moe_param_group(param_group: Mapping[str, Any]) -> bool:
    """Whether a group is one of experts."""
    return bool(param_group.get("moe", False))


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Sequence[dict[str, Any]], max_group_size: float | None = MAX_GROUP_NUMEL
) -> list[dict[str, Any]]:
    """Groups in which no expert's parameter is with others: theirs follow, of at most `max_group_size` elements each.

    Every group has a `name`. The given groups are changed: experts' parameters leave them. Raises DeepSpeedError for a
    group without a name.
    """
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    added: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        by_name: dict[str, list[Tensor]] = {}
        shared = []
        for param in group["params"]:
            if is_moe_param(param):
                by_name.setdefault(getattr(param, "group_name", None) or "experts", []).append(param)
            else:
                shared.append(param)
        if not by_name:
            continue
        if "name" not in group:
            raise DeepSpeedError(
                f"parameter group {i} has experts' parameters and no name.\n  Give it one: {{'params': [...], 'name': 'parameters'}}."
            )
        group["params"] = shared
        settings = {key: value for key, value in group.items() if key not in ("params", "name")}
        for name, params in by_name.items():
            chunks = _chunks(params, max_group_size)
            added += [{"params": chunk, **settings, "name": name, "moe": True} for chunk in chunks]
    return groups + added


def _chunks(params: Sequence[Tensor], limit: float | None) -> list[list[Tensor]]:
    chunks: list[list[Tensor]] = [[]]
    numel = 0
    for param in params:
        if limit is not None and chunks[-1] and numel + param.numel() > limit:
            chunks.append([])
            numel = 0
        chunks[-1].append(param)
        numel += param.numel()
    return chunks


def configure_moe_param_groups(model_parameters: Iterable[Any]) -> list[Any]:
    """What the engine makes of the parameters or groups it was given: the same without experts, else split groups."""
    given = list(model_parameters)
    if not given:
        return given
    if not isinstance(given[0], (dict, torch.Tensor)):
        raise DeepSpeedError(
            f"model_parameters has a {type(given[0]).__name__}: neither parameters nor groups of them."
        )
    is_flat = not isinstance(given[0], dict)
    params = given if is_flat else [param for group in given for param in group["params"]]
    if not any(is_moe_param(param) for param in params):
        return given
    groups: list[dict[str, Any]] = [{"params": given}] if is_flat else [dict(group) for group in given]
    for group in groups:
        group.setdefault("name", "parameters")
    return split_params_into_different_moe_groups_for_optimizer(groups)
