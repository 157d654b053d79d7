from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.optim import DeepSpeedCPUAdagrad
from tests.optim.sharded import step_shards
from tests.optim.steps import after_steps, assert_close, gradients, parameters


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_those_of_torch(weight_decay: float) -> None:
    assert_close(
        after_steps(lambda p: DeepSpeedCPUAdagrad(p, lr=0.1, weight_decay=weight_decay)),
        after_steps(lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=weight_decay)),
    )


def test_runs_of_several_parameters_step_as_the_parameters_do() -> None:
    ours, _ = step_shards(DeepSpeedCPUAdagrad, [{"params": parameters()}], gradients(3), cuts=[10, 33])
    assert_close(ours, after_steps(DeepSpeedCPUAdagrad, 3))


@pytest.mark.parametrize("fp32", [True, False])
def test_bf16_parameters_step_with_sums_in_either_dtype(fp32: bool) -> None:
    (param,) = parameters([(3,)], dtype=torch.bfloat16)
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    before = param.detach().clone()
    optimizer = DeepSpeedCPUAdagrad([param], lr=0.125, fp32_optimizer_states=fp32, weight_decay=0.5)
    optimizer.step()
    assert optimizer.state[param]["sum"].dtype is (torch.float32 if fp32 else torch.bfloat16)
    assert torch.allclose(param, before - 0.125 * (1 + before / 2).sign(), rtol=1e-2)


def test_the_cpu_optimizer_refuses_tensors_elsewhere() -> None:
    param = nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(AssertionError, match="DeepSpeedCPUAdagrad updates parameters in main memory"):
        DeepSpeedCPUAdagrad([param]).step()
