from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.optim import DeepSpeedCPULion, FusedLion
from tests.optim.sharded import step_shards
from tests.optim.steps import after_steps, assert_close, gradients, parameters, tensors

BOTH = pytest.mark.parametrize("kind", [FusedLion, DeepSpeedCPULion])


@BOTH
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_the_formula(kind: type, weight_decay: float) -> None:
    params = [tensor.double() for tensor in tensors()]
    moments = [torch.zeros_like(p) for p in params]
    for row in gradients(4):
        for p, m, g in zip(params, moments, row, strict=True):
            p.sub_(0.01 * ((0.9 * m + 0.1 * g).sign() + weight_decay * p))
            m.mul_(0.99).add_(0.01 * g)
    ours = after_steps(lambda p: kind(p, lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay))
    assert_close(ours, params)


@BOTH
def test_runs_of_several_parameters_step_as_the_parameters_do(kind: type) -> None:
    ours, _ = step_shards(kind, [{"params": parameters()}], gradients(3), cuts=[10, 33])
    assert_close(ours, after_steps(kind, 3))


@BOTH
def test_momentum_of_bf16_parameters_is_fp32(kind: type) -> None:
    (param,) = parameters([(3,)], dtype=torch.bfloat16)
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    before = param.detach().clone()
    optimizer = kind([param], lr=0.125)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype is torch.float32
    assert torch.equal(param, before - 0.125)


def test_momentum_may_have_the_parameters_dtype() -> None:
    (param,) = parameters([(3,)], dtype=torch.bfloat16)
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer = DeepSpeedCPULion([param], fp32_optimizer_states=False)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype is torch.bfloat16


def test_the_cpu_optimizer_refuses_tensors_elsewhere() -> None:
    param = nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(AssertionError, match="DeepSpeedCPULion updates parameters in main memory"):
        DeepSpeedCPULion([param]).step()
