"""Where ranks have slices of the gradients, a script that clips, edits or drops `param.grad` is told that it has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.zero import veil
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks


def clip_norm(model: nn.Module) -> None:
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm == 0.0, "the row of the documentation says so"


def clip_value(model: nn.Module) -> None:
    with pytest.raises(RuntimeError):  # torch does not clip an empty list; our words come before its own
        nn.utils.clip_grad_value_(model.parameters(), 0.01)


def drop(model: nn.Module) -> None:
    model[2].bias.grad = None  # type: ignore[union-attr, index]


def zero(model: nn.Module) -> None:
    model.zero_grad()


def read_one(model: nn.Module) -> None:
    assert model[0].weight.grad is None  # type: ignore[union-attr, index]


def nothing(model: nn.Module) -> None:
    """The clean path."""


LOOKS: list[Callable[[nn.Module], None]] = [clip_norm, clip_value, drop, zero, read_one, nothing]


def told(rank: int, world_size: int, stage: int, threshold: int) -> dict[str, list[str]]:
    """What each look is told in three steps; the weights do not depend on whether anybody looked."""
    words: dict[str, list[str]] = {}
    weights = []
    original = veil.warn_once
    for look in LOOKS:
        veil.warn_once = words.setdefault(look.__name__, []).append  # type: ignore[assignment]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        zero_section = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold}}
        config: dict[str, Any] = make_config(stage, micro=4, optimizer={"type": "SGD", "params": {"lr": 0.1}})
        config["zero_optimization"] |= zero_section["zero_optimization"]
        try:
            with engine_of(model, config) as engine:
                for step in range(3):
                    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
                    engine.backward(engine(x).square().mean())
                    look(model)
                    assert all(isinstance(param, nn.Parameter) for param in model.parameters())
                    engine.step()
                    read_nothing_of_it = [param.grad for param in model.parameters()]
                    assert not any(read_nothing_of_it), "after the step None is what it is in plain PyTorch"
                with deepspeed.zero.GatheredParameters(list(model.parameters())):
                    weights.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
            if stage < 3:
                assert {type(param) for param in model.parameters()} == {nn.Parameter}
        finally:
            veil.warn_once = original
    assert all(torch.equal(weights[0], other) for other in weights)
    return words


@pytest.mark.parametrize(("stage", "threshold"), [(1, 0), (2, 0), (3, 0), (3, 10**6)])
def test_a_script_that_looks_at_gradients_which_are_slices_is_told_once(stage: int, threshold: int) -> None:
    for words in run_ranks(2, told, stage, threshold):
        assert words.pop("nothing") == []
        for name, found in words.items():
            assert len(found) == 1, (name, found)
            assert "gradient_clipping" in found[0] and "safe_set_full_grad" in found[0]
            assert found[0].startswith("2.bias.grad" if name == "drop" else "0.weight.grad"), name


def never_told(rank: int, world_size: int, stage: int) -> list[str]:
    words: list[str] = []
    original, veil.warn_once = veil.warn_once, words.append  # type: ignore[assignment]
    try:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        with engine_of(model, make_config(stage, micro=4, accumulation=2)) as engine:
            for _ in range(4):
                engine.backward(engine(torch.ones(4, 6)).square().mean())
                assert (model[0].weight.grad is None) == (stage > 0 and not engine.is_gradient_accumulation_boundary())
                engine.step()
    finally:
        veil.warn_once = original
    return words


def test_one_rank_at_stage_3_is_told_of_those_it_does_not_see() -> None:
    (words,) = run_ranks(1, told, 3, 0)
    assert words.pop("nothing") == [] and all(len(found) == 1 for found in words.values())


def test_one_rank_has_its_gradients_and_is_told_nothing() -> None:
    assert run_ranks(1, never_told, 1) == [[]]
