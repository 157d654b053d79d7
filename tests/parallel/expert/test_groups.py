"""Optimizer groups of experts, and what layers with experts refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    is_moe_param_group,
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)
from deepspeed.parallel.expert import hugging_face, presets
from deepspeed.utils.errors import DeepSpeedError
from tests.engine.runs import make_config
from tests.harness import run_ranks
from tests.parallel.expert.models import WIDTH, FeedForward, Model


def model(ep_sizes: tuple[int, ...] = (1, 1)) -> Model:
    return Model([MoE(WIDTH, FeedForward(), 4, ep_size=ep) for ep in ep_sizes])


def test_experts_get_groups_of_their_own_of_bounded_size_behind_the_others() -> None:
    experts = [p for p in model().parameters() if is_moe_param(p)]
    given: dict[str, Any] = {"params": list(model().parameters()), "name": "x", "lr": 0.1}
    experts = [p for p in given["params"] if is_moe_param(p)]
    groups = split_params_into_different_moe_groups_for_optimizer(given, max_group_size=500)
    assert groups[0] is given and not any(is_moe_param(p) for p in given["params"])
    assert [p for group in groups[1:] for p in group["params"]] == experts
    assert all(is_moe_param_group(g) and g["name"] == "ep_size_1" and g["lr"] == 0.1 for g in groups[1:])
    assert all(sum(p.numel() for p in g["params"]) <= 500 for g in groups[1:])
    with pytest.raises(ValueError, match="parameter group 0 has experts' parameters and no name"):
        split_params_into_different_moe_groups_for_optimizer([{"params": experts}])


def test_a_list_of_parameters_becomes_groups_only_where_there_are_experts() -> None:
    plain = list(nn.Linear(2, 2).parameters())
    assert configure_moe_param_groups(plain) == plain
    groups = configure_moe_param_groups(list(model().parameters()))
    assert [group["name"] for group in groups] == ["parameters", "ep_size_1"]
    assert has_moe_layers(model()) == (True, 4) and has_moe_layers(nn.Linear(2, 2)) == (False, 0)


def test_what_is_an_expert_follows_from_the_module_and_never_from_a_name() -> None:
    named = nn.Module()
    named.expert_weight = nn.Parameter(torch.zeros(2))
    shared, experts = split_params_into_shared_and_expert_params(named.parameters())
    assert len(shared) == 1 and not experts


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: MoE(8, nn.Linear(8, 8), num_experts=4, ep_size=3),
            "num_experts = 4 should be divisible by ep_size = 3",
        ),
        (lambda: MoE(8, nn.Linear(8, 8), num_experts=0), "A layer has at least one expert"),
        (lambda: MoE(8, None, num_experts=4), "a gate without experts"),
        (lambda: MoE(8, nn.Linear(8, 8), capacity_factor=0), "capacity_factor = 0: experts would take no token"),
        (lambda: MoE(8, nn.Linear(8, 8), 4, ep_size=2)(torch.zeros(2, 8)), "does not know its ranks yet"),
    ],
)
def test_layers_that_cannot_be_are_refused_in_words(call: Any, text: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=text):
        call()


def refusals(rank: int, world_size: int) -> list[str]:
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (model((4, 4)), {}),
        (nn.Linear(2, 2), {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
        (blocks(3), {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
        (blocks(4), {"expert_parallel": {"enabled": True, "autoep_size": 8}}),
        (blocks(4), {"expert_parallel": {"enabled": True, "autoep_size": 2, "expert_tensor_parallel_size": 2}}),
        (blocks(4, frozen=True), {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
        (blocks(4), {"expert_parallel": {"enabled": True, "autoep_size": 2, "moe_layer_pattern": "nothing"}}),
        (blocks(4), {"expert_parallel": {"enabled": True, "autoep_size": 2, "top_k": 3}}),
        (in_two_dtypes(), {"expert_parallel": {"enabled": True, "autoep_size": 2}}),
        (frozen_on(rank == 0), {}),
        (double_on(rank == 1), {}),
        (model((2, 2) if rank == 0 else (1, 1)), {}),
    ]
    found = []
    for case, extra in cases:
        with pytest.raises(DeepSpeedError) as caught:
            deepspeed.initialize(model=case, config=make_config(1, micro=1, **extra))
        found.append(str(caught.value).splitlines()[0])
    return found


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.top_k = 2
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 8, 4))
        self.experts.down_proj = nn.Parameter(torch.zeros(num_experts, 4, 4))


def blocks(num_experts: int, frozen: bool = False) -> nn.Module:
    made = nn.Sequential(Block(num_experts))
    made[0].experts.down_proj.requires_grad_(not frozen)
    return made


def in_two_dtypes() -> nn.Module:
    made = blocks(4)
    made[0].experts.down_proj.data = made[0].experts.down_proj.data.bfloat16()
    return made


def double_on(is_here: bool) -> nn.Module:
    """`MoE` layers, in float64 if that is this rank's."""
    made = model((2, 2))
    return made.double() if is_here else made


def frozen_on(is_here: bool) -> nn.Module:
    """`MoE` layers, one of whose experts is frozen if it is on this rank."""
    made = model((2, 2))
    made.layers[0].deepspeed_moe.experts.deepspeed_experts[1].requires_grad_(not is_here)
    return made


def test_models_that_do_not_fit_are_refused_on_all_ranks_before_anything_is_built() -> None:
    expected = [
        "expert parallel size 4 does not divide the 2 ranks",
        "expert_parallel.enabled is true, but the model has no module with the matrices of all experts",
        "expert_parallel.autoep_size = 2 must divide the 3 experts of 0.experts",
        "expert_parallel.autoep_size = 8 exceeds num_experts = 4 of 0.experts",
        "expert_parallel.expert_tensor_parallel_size = 2: single experts are not cut",
        "the experts' matrices of 0.experts have different requires_grad",
        "expert_parallel.enabled is true, but the model has no module",
        "expert_parallel.top_k = 3, but the router of 0.experts has 2",
        "the experts' matrices of 0.experts have different dtypes or devices",
        "the experts of layers.0 have different requires_grad",
        "ranks have different experts in layers.0.deepspeed_moe: rank 0 has ep_size = 2, float32, rank 1 has ep_size = 2, float64",
        "ranks have different experts in layers.0.deepspeed_moe: rank 0 has ep_size = 2, float32, rank 1 has ep_size = 1, float32",
    ]
    for found in run_ranks(2, refusals):
        assert all(start in text for text, start in zip(found, expected, strict=True)), found


def test_a_block_that_keeps_its_experts_otherwise_is_left_as_it_is() -> None:
    known, unknown = Block(4), nn.Module()
    unknown.experts = nn.ModuleList([nn.Linear(2, 2)])
    both = nn.ModuleDict({"known": known, "unknown": unknown})
    from deepspeed.config import load_config

    found = hugging_face.find(both, load_config({"expert_parallel": {"enabled": True}}).expert_parallel)
    assert list(found) == ["known.experts"]
    assert hugging_face.left_alone(both, found) == ["unknown"]


def test_a_list_of_experts_of_different_shapes_is_named() -> None:
    from deepspeed.config import load_config

    unlike = nn.Module()
    unlike.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)])
    config = load_config({"expert_parallel": {"enabled": True}}).expert_parallel
    with pytest.raises(DeepSpeedError, match="experts 0 and 2 of block have different shapes"):
        presets.check_model(nn.ModuleDict({"block": unlike}), [], {}, config)
