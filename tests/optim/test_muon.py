"""Against the formula in float64, and shards against whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.optim import Muon, MuonWithAuxAdam, split_for_muon
from deepspeed.optim.muon import orthogonal_update
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from tests.optim.sharded import step_shards
from tests.optim.steps import assert_close, gradients, parameters, step, tensors

MATRICES = [(4, 6), (8, 3), (5, 5)]
METHODS = pytest.mark.parametrize("ns_method", ["gram", "standard"])


def newton_schulz(u: Tensor) -> Tensor:
    """The orthogonalised matrix, scaled; one 2-D matrix in float64."""
    rows, cols = u.shape
    x = u.double().T if rows > cols else u.double()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if rows > cols else x) * max(1, rows / cols) ** 0.5


def by_formula(num_steps: int, *, lr: float, momentum: float, weight_decay: float) -> list[Tensor]:
    params = [tensor.double() for tensor in tensors(MATRICES)]
    moments = [torch.zeros_like(p) for p in params]
    for row in gradients(num_steps, MATRICES):
        for p, m, g in zip(params, moments, row, strict=True):
            m.lerp_(g.double(), 1 - momentum)
            u = g.double().lerp(m, momentum)
            p.mul_(1 - lr * weight_decay).sub_(lr * newton_schulz(u))
    return params


def mixed_groups() -> list[dict[str, Any]]:
    params = parameters([*MATRICES, (7,), (3, 2)])
    return [
        {"params": params[:2], "use_muon": True, "lr": 0.1, "weight_decay": 0.1},
        {"params": params[2:3], "use_muon": True, "ns_method": "standard"},
        {"params": params[3:], "use_muon": False, "lr": 0.01, "weight_decay": 0.1},
    ]


@METHODS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_the_formula(ns_method: str, weight_decay: float) -> None:
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": weight_decay}
    ours = step(Muon(parameters(MATRICES), ns_method=ns_method, **settings), gradients(3, MATRICES))
    assert_close(ours, by_formula(3, **settings), rtol=1e-4, atol=1e-4)


@METHODS
@pytest.mark.parametrize("cuts", [[10], [24, 30], [3, 5, 60], [0]])
def test_cut_matrices_step_as_whole_ones_do(ns_method: str, cuts: list[int]) -> None:
    def make(params: Any) -> Muon:
        return Muon(params, lr=0.05, weight_decay=0.1, ns_method=ns_method)

    ours, _ = step_shards(make, [{"params": parameters(MATRICES)}], gradients(3, MATRICES), cuts)
    assert_close(ours, step(make(parameters(MATRICES)), gradients(3, MATRICES)))


@pytest.mark.parametrize("cuts", [[10], [55, 75], [80]])
def test_both_halves_step_on_shards_as_on_whole_parameters(cuts: list[int]) -> None:
    rows = gradients(3, [*MATRICES, (7,), (3, 2)])
    ours, _ = step_shards(MuonWithAuxAdam, mixed_groups(), rows, cuts)
    assert_close(ours, step(MuonWithAuxAdam(mixed_groups()), rows))


def test_the_adam_half_is_adamw() -> None:
    rows = gradients(3, [(7,)])
    ours = step(MuonWithAuxAdam([{"params": parameters([(7,)]), "use_muon": False, "weight_decay": 0.1}]), rows)
    theirs = torch.optim.AdamW(parameters([(7,)]), lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    assert_close(ours, step(theirs, rows))


@METHODS
def test_singular_values_become_about_one(ns_method: str) -> None:
    (update,) = tensors([(16, 48)])
    values = torch.linalg.svdvals(orthogonal_update(update, ns_method))
    assert 0.6 < values.min() < values.max() < 1.3


@METHODS
def test_a_stack_of_matrices_is_orthogonalised_one_by_one(ns_method: str) -> None:
    (stack,) = tensors([(3, 8, 4)])
    one_by_one = torch.stack([orthogonal_update(matrix, ns_method) for matrix in stack])
    torch.testing.assert_close(orthogonal_update(stack, ns_method), one_by_one)


def test_filters_are_flattened_to_matrices() -> None:
    (filters,) = tensors([(6, 2, 3, 3)])
    expected = orthogonal_update(filters.flatten(1), "gram").view_as(filters)
    torch.testing.assert_close(orthogonal_update(filters, "gram"), expected)


def test_a_vector_in_the_muon_half_is_named_with_the_cure() -> None:
    with pytest.raises(DeepSpeedError, match=r'shape \(7,\): it updates matrices.\n.*"use_muon": False'):
        step(Muon(parameters([(7,)])), gradients(1, [(7,)]))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(DeepSpeedError, match='"gram" or "standard"'):
        Muon(parameters(MATRICES), ns_method="svd")


def test_a_group_must_say_whether_it_is_muons() -> None:
    with pytest.raises(DeepSpeedError, match='parameter group 1 has no "use_muon"'):
        MuonWithAuxAdam([{"params": parameters(), "use_muon": False}, {"params": parameters()}])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_Embedding = nn.Embedding(4, 2)
        self.hidden = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.lm_head = nn.Linear(2, 4)


def names_by_half(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[bool, list[str]]]:
    names = {param: name for name, param in model.named_parameters()}
    return [(group["use_muon"], [names[param] for param in group["params"]]) for group in groups]


def test_matrices_go_to_muon_except_embeddings_and_heads() -> None:
    model = Model()
    assert names_by_half(model, split_for_muon(model.named_parameters())) == [
        (True, ["hidden.weight"]),
        (False, ["token_Embedding.weight", "hidden.bias", "lm_head.weight", "lm_head.bias"]),
    ]


def test_the_users_groups_are_split_and_keep_their_settings() -> None:
    model = Model()
    groups = [
        {"params": list(model.hidden.parameters()), "lr": 0.5},
        {"params": [model.lm_head.weight], "use_muon": True},
    ]
    split = split_for_muon(model.named_parameters(), groups)
    assert names_by_half(model, split) == [
        (True, ["hidden.weight"]),
        (False, ["hidden.bias"]),
        (True, ["lm_head.weight"]),
    ]
    assert [group.get("lr") for group in split] == [0.5, 0.5, None]


def test_a_sharded_parameter_counts_with_its_full_shape() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape = torch.Size([2, 2])  # type: ignore[assignment]
    assert [group["use_muon"] for group in split_for_muon(model.named_parameters())] == [True]


def test_a_parameter_from_outside_the_model_is_named() -> None:
    with pytest.raises(
        DeepSpeedConfigError, match=r"shape \(3, 2\) in model_parameters is not a parameter of the model"
    ):
        split_for_muon(Model().named_parameters(), [{"params": parameters([(3, 2)])}])
