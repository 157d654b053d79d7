from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.optim import DeepSpeedCPUSGD
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError
from tests.optim.sharded import step_shards
from tests.optim.steps import after_steps, assert_close, gradients, parameters, step


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_steps_equal_those_of_torch(settings: dict[str, Any]) -> None:
    ours = after_steps(lambda p: DeepSpeedCPUSGD(p, lr=0.1, **settings))
    assert_close(ours, after_steps(lambda p: torch.optim.SGD(p, lr=0.1, **settings)))


def test_runs_of_several_parameters_step_as_the_parameters_do() -> None:
    def make(params: Any) -> DeepSpeedCPUSGD:
        return DeepSpeedCPUSGD(params, lr=0.1, momentum=0.9)

    ours, _ = step_shards(make, [{"params": parameters()}], gradients(3), cuts=[10, 33])
    assert_close(ours, after_steps(make, 3))


def test_only_groups_with_momentum_keep_one() -> None:
    plain, heavy = parameters([(2,), (3,)])
    optimizer = DeepSpeedCPUSGD([{"params": [plain]}, {"params": [heavy], "momentum": 0.9}])
    step(optimizer, gradients(1, [(2,), (3,)]))
    assert set(optimizer.state[plain]) == {"step"}
    assert set(optimizer.state[heavy]) == {"step", "momentum_buffer"}
    assert optimizer.state_names == {"momentum_buffer": torch.float32}


def test_state_of_torchs_goes_on_with_its_dampening() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    theirs = torch.optim.SGD(parameters(), **settings)
    step(theirs, gradients(2))
    ours = DeepSpeedCPUSGD(parameters(), **settings)
    ours.load_state_dict({**ours.state_dict(), "state": copy.deepcopy(theirs.state_dict()["state"])})
    for mine, param in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        mine.data.copy_(param.data)
    assert_close(step(ours, gradients(3)[2:]), step(theirs, gradients(3)[2:]))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(settings: dict[str, float]) -> None:
    with pytest.raises(DeepSpeedError, match=r"nesterov = True with momentum .*\n  Set momentum above 0"):
        DeepSpeedCPUSGD(parameters(), nesterov=True, **settings)


def test_a_switch_of_torchs_in_a_group_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(2))], "maximize": True}
    with pytest.raises(NotAvailableError, match="DeepSpeedCPUSGD does not support maximize=True"):
        DeepSpeedCPUSGD([group])
