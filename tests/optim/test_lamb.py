"""Against the formula in float64, and shards against whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspeed.optim import FusedLamb
from deepspeed.utils.errors import DeepSpeedError
from tests.optim.sharded import step_shards
from tests.optim.steps import SHAPES, after_steps, assert_close, gradients, parameters, tensors


def by_formula(
    num_steps: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
) -> tuple[list[Tensor], list[float]]:
    """Parameters after the steps, and the last step's trust ratios."""
    params = [tensor.double() for tensor in tensors()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    ratios: list[float] = []
    for t, row in enumerate(gradients(num_steps), start=1):
        ratios = []
        for p, (m, v), g in zip(params, moments, row, strict=True):
            m.mul_(betas[0]).add_((1 - betas[0]) * g)
            v.mul_(betas[1]).add_((1 - betas[1]) * g.double() ** 2)
            mhat = m / (1 - betas[0] ** t) if bias_correction else m
            vhat = v / (1 - betas[1] ** t) if bias_correction else v
            denominator = (vhat + eps).sqrt() if eps_inside_sqrt else vhat.sqrt() + eps
            u = mhat / denominator + weight_decay * p
            ratio = 1.0
            if p.norm() > 0 and u.norm() > 0:
                ratio = min(max((p.norm() / u.norm()).item(), min_coeff), max_coeff)
            p.sub_(lr * ratio * u)
            ratios.append(ratio)
    return params, ratios


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "bias_correction": False, "betas": (0.5, 0.7)},
        {"lr": 0.05, "eps": 1e-3, "eps_inside_sqrt": True},
        {"lr": 0.05, "max_coeff": 0.9, "min_coeff": 0.8},
    ],
)
def test_steps_equal_the_formula(settings: dict[str, Any]) -> None:
    assert_close(after_steps(lambda p: FusedLamb(p, **settings)), by_formula(4, **settings)[0])


@pytest.mark.parametrize("cuts", [[10], [24, 30], [3, 5, 40], [0], [sum(torch.Size(s).numel() for s in SHAPES)]])
def test_cut_parameters_step_as_whole_ones_do(cuts: list[int]) -> None:
    ours, _ = step_shards(lambda g: FusedLamb(g, lr=0.05), [{"params": parameters()}], gradients(3), cuts)
    assert_close(ours, after_steps(lambda p: FusedLamb(p, lr=0.05), 3))


def test_each_group_keeps_its_own_settings_on_shards() -> None:
    def groups() -> list[dict[str, Any]]:
        params = parameters()
        return [
            {"params": params[:2], "lr": 0.05, "max_coeff": 0.5},
            {"params": params[2:], "lr": 0.01, "weight_decay": 0.2},
        ]

    whole = FusedLamb(groups())
    params = [param for group in whole.param_groups for param in group["params"]]
    for row in gradients(3):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        whole.step()
    ours, _ = step_shards(FusedLamb, groups(), gradients(3), cuts=[20, 35])
    assert_close(ours, params)


def test_the_coefficients_are_those_of_the_last_step_for_the_pieces_here() -> None:
    optimizer = FusedLamb(parameters(), lr=0.05)
    assert optimizer.get_lamb_coeffs() == []
    for param, grad in zip(optimizer.param_groups[0]["params"], gradients(1)[0], strict=True):
        param.grad = grad
    optimizer.step()
    expected = by_formula(1, lr=0.05)[1]
    assert optimizer.get_lamb_coeffs() == pytest.approx(expected)

    _, shards = step_shards(lambda g: FusedLamb(g, lr=0.05), [{"params": parameters()}], gradients(1), cuts=[10])
    assert shards[0].get_lamb_coeffs() == pytest.approx(expected[:1])  # type: ignore[attr-defined]
    assert shards[1].get_lamb_coeffs() == pytest.approx(expected)  # type: ignore[attr-defined]


def test_a_zero_parameter_has_ratio_one() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = FusedLamb([param], max_coeff=0.5)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == [1.0]


def test_bf16_parameters_step_with_fp32_moments() -> None:
    ours = after_steps(lambda p: FusedLamb(p, lr=0.01), 3, dtype=torch.bfloat16)
    assert_close(ours, after_steps(lambda p: FusedLamb(p, lr=0.01), 3), rtol=0.05, atol=0.05)


def test_clipping_is_left_to_the_engine() -> None:
    with pytest.raises(DeepSpeedError, match=r'max_grad_norm = 1\.0.*\n.*set "gradient_clipping": 1\.0'):
        FusedLamb(parameters(), max_grad_norm=1.0)


def test_amsgrad_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="FusedLamb does not support amsgrad"):
        FusedLamb(parameters(), amsgrad=True)
