"""What `expert_parallel` says about a model's blocks, held against what the blocks are.

Called by the engine before experts are spread. The routers are the models' own, so what a configuration says about them
is checked, never applied: what agrees is fine, what contradicts the model is refused with the model's value.

Families that the public contract names; others are found by structure alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.parallel.expert.adapters import without_wrappers
from deepspeed.parallel.expert.recipe import Recipe
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once

FAMILIES: dict[str, tuple[str, ...]] = {
    "mixtral": ("mixtral",),
    "qwen3_moe": ("qwen3_moe", "qwen2_moe"),
    "qwen3_5_moe": ("qwen3_5_moe", "qwen3_5_moe_text"),
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v3": ("deepseek_v3",),
    "minimax_m3": ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"),
}
"""The contract's presets, and the model types that each is for."""


def _unlike(model: nn.Module) -> str:
    """Names a list of experts that differ, which may be why no block was found."""
    for name, module in model.named_modules():
        experts = module._modules.get("experts")
        each = list(experts) if isinstance(experts, nn.ModuleList) else []
        shapes = [[tuple(param.shape) for param in expert.parameters()] for expert in each]
        other = next((i for i, found in enumerate(shapes) if found != shapes[0]), None)
        if other is not None:
            return f" (the experts 0 and {other} of {name or 'the model'} have different shapes, {shapes[0]} and {shapes[other]})"
    return ""


def check_model(
    model: nn.Module, found: Collection[str], recipes: Mapping[str, Recipe], config: ExpertParallelConfig
) -> None:
    """Refuse what contradicts the model; name what has no effect. Raises DeepSpeedConfigError."""
    if config.expert_tensor_parallel_size != 1:
        raise DeepSpeedConfigError(
            f"expert_parallel.expert_tensor_parallel_size = {config.expert_tensor_parallel_size}: single experts are not cut.\n"
            "  Use expert_tensor_parallel_size=1, and a larger autoep_size."
        )
    if not found and not recipes:
        raise DeepSpeedConfigError(
            "expert_parallel.enabled is true, but the model has no module with the matrices of all experts "
            f"([experts, ...] {' or '.join(('gate_up_proj', 'up_proj'))} and down_proj), and no block with a list of experts "
            "whose routing is understood"
            + (f" that fits moe_layer_pattern = {config.moe_layer_pattern!r}" if config.moe_layer_pattern else "")
            + _unlike(model)
            + ".\n  Check the pattern, or remove expert_parallel; for layers of your own use deepspeed.moe.layer.MoE."
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if config.preset_model is not None and kind is not None and kind not in FAMILIES[config.preset_model]:
        warn_once(
            f"expert_parallel.preset_model = {config.preset_model!r}, but the model is a {kind!r}: its experts are found by "
            "structure, and its own router is used."
        )
    if config.router_pattern and not recipes:
        warn_once(
            f"expert_parallel.router_pattern = {config.router_pattern!r} has no effect: it is for blocks with a list of experts."
        )
    for name in found:
        _check_router(model, name, config)
    for name, recipe in recipes.items():
        _check_recipe(name, recipe, config)


def _check_recipe(name: str, recipe: Recipe, config: ExpertParallelConfig) -> None:
    if recipe.by == "router":
        return  # which is the model's own, and says no numbers
    said: dict[str, tuple[Any, Any]] = {
        "top_k": (config.top_k, recipe.top_k),
        "route_norm": (config.route_norm, recipe.sums_to_one),
        "routed_scaling_factor": (config.routed_scaling_factor, recipe.scale),
        "score_func": (config.score_func, recipe.by),
    }
    for key, (wanted, told) in said.items():
        if wanted not in (None, "auto", told):
            raise _contradiction(key, wanted, name, told)


def _contradiction(key: str, wanted: Any, name: str, told: Any) -> DeepSpeedConfigError:
    return DeepSpeedConfigError(
        f"expert_parallel.{key} = {wanted}, but the router of {name} has {told}.\n"
        f"  Leave {key} out, or make the model with that value: its own router is used."
    )


def _check_router(model: nn.Module, name: str, config: ExpertParallelConfig) -> None:
    said: dict[str, tuple[Any, tuple[str, ...]]] = {
        "top_k": (config.top_k, ("top_k", "num_experts_per_tok")),
        "route_norm": (config.route_norm, ("norm_topk_prob",)),
        "routed_scaling_factor": (config.routed_scaling_factor, ("routed_scaling_factor",)),
        "num_expert_groups": (config.num_expert_groups, ("num_group", "n_group", "n_groups")),
        "num_limited_groups": (config.num_limited_groups, ("topk_group",)),
    }
    for key, (wanted, aliases) in said.items():
        if wanted is None or wanted == "auto":
            continue
        told = next(_values(model, name, aliases), None)
        if told != wanted:
            raise _contradiction(key, wanted, name, told)


def _values(model: nn.Module, name: str, aliases: tuple[str, ...]) -> Iterator[Any]:
    """What the block's router, the block or the model's configuration says."""
    block = model.get_submodule(without_wrappers(name).rpartition(".")[0])
    config = getattr(model, "config", None)
    owners = [getattr(block, "gate", None), getattr(block, "router", None), block, config]
    for owner in owners:
        for alias in aliases:
            value = getattr(owner, alias, None)
            if value is not None and not isinstance(value, nn.Module):
                yield value
