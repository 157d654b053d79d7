"""Blocks that keep their experts as a list: found by structure, understood by trying, equal to the plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.config import load_config
from deepspeed.parallel.expert import hugging_face, listed
from deepspeed.parallel.expert.recipe import Recipe
from tests.engine.runs import make_config
from tests.harness import run_ranks
from tests.parallel.expert.lists import KINDS, Model, plain, train
from tests.parallel.expert.models import LONG, set_values
from tests.parallel.expert.runs import compare

RECIPES = {
    "Softmax": Recipe("gate", "softmax", 2, True, 1.0, returns_logits=True),
    "Shared": Recipe("gate", "softmax", 2, False, 1.0, ("shared_expert",), "shared_expert_gate", returns_logits=True),
    "Scaled": Recipe("gate", "sigmoid", 2, True, 1.5),
    "Routed": Recipe("gate", "router", 2, False, 1.0, ("shared_experts",)),
}
SETTINGS = load_config({"expert_parallel": {"enabled": True, "autoep_size": 2}}).expert_parallel


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_does_is_found_out_without_a_trace(kind: str) -> None:
    model = Model(kind)
    set_values(model)
    model.blocks[0].eval()
    before = torch.get_rng_state()
    found = listed.find(model, SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.blocks[0].experts[1].training and model.blocks[1].experts[1].training
    if kind == "Strange":
        assert not found and hugging_face.left_alone(model, found) == ["blocks.0", "blocks.1"]
    else:
        assert [block.recipe for block in found.values()] == [RECIPES[kind]] * 2


@pytest.mark.parametrize(
    ("kind", "stage", "is_clients"),
    [
        ("Softmax", 0, True),
        ("Shared", 3, False),
        pytest.param("Softmax", 3, True, marks=LONG),
        pytest.param("Shared", 2, False, marks=LONG),
        pytest.param("Scaled", 1, False, marks=LONG),
        ("Routed", 2, False),
    ],
)
def test_spread_lists_of_experts_equal_the_plain_model(kind: str, stage: int, is_clients: bool) -> None:
    compare(run_ranks(2, train, kind, 2, stage, is_clients), plain(kind, 2))


def test_a_run_of_lists_goes_on_with_all_experts_everywhere(tmp_path: Path) -> None:
    run_ranks(2, train, "Routed", 2, 2, save=str(tmp_path))
    expected = plain("Routed", 2)
    expected.losses, expected.norms = expected.losses[2:], expected.norms[2:]
    compare(run_ranks(2, train, "Routed", 1, 0, load=str(tmp_path)), expected)


def refusals(rank: int, world_size: int) -> list[str]:
    def frozen() -> nn.Module:
        model = Model("Softmax")
        model.blocks[1].experts[2].w1.weight.requires_grad_(False)
        return model

    def in_two_dtypes() -> nn.Module:
        model = Model("Softmax")
        model.blocks[0].experts[3].bfloat16()
        return model

    cases = [
        (frozen(), {}),
        (in_two_dtypes(), {}),
        (Model("Softmax"), {"autoep_size": 3}),
        (Model("Shared"), {"route_norm": True}),
        (Model("Softmax"), {"score_func": "sigmoid"}),
        (Model("Strange"), {}),
    ]
    found = []
    for model, extra in cases:
        set_values(model)
        settings = {"enabled": True, "autoep_size": 2, **extra}
        with pytest.raises((ValueError, AssertionError)) as caught:
            deepspeed.initialize(model=model, config=make_config(1, micro=1, expert_parallel=settings))
        found.append(str(caught.value).splitlines()[0])
    return found


def test_lists_that_do_not_fit_are_refused_on_all_ranks() -> None:
    expected = [
        "the experts of blocks.1 have different requires_grad",
        "the experts of blocks.0 have different dtypes or devices",
        "expert_parallel.autoep_size = 3 must divide the 4 experts of blocks.0",
        "expert_parallel.route_norm = True, but the router of blocks.0 has False",
        "expert_parallel.score_func = sigmoid, but the router of blocks.0 has softmax",
        "expert_parallel.enabled is true, but the model has no module with the matrices of all experts",
    ]
    for found in run_ranks(2, refusals):
        assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found
