"""1-bit optimizers by themselves: what a group may ask for, what they refuse, and the states that scripts read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam
from deepspeed.utils.errors import NotAvailableError

KINDS: dict[type[Any], dict[str, Any]] = {
    OnebitAdam: {"freeze_step": 2},
    OnebitLamb: {"freeze_step": 2},
    ZeroOneAdam: {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 2},
}
FLAGS = {OnebitAdam: "adam_freeze_key", OnebitLamb: "lamb_freeze_key", ZeroOneAdam: "freeze_key"}


def stepped(optimizer: Any, param: nn.Parameter, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_gradient_is_refused_by_name_in_the_first_step(kind: Any) -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(10, 4\) is sparse, which 1-bit optimizers do not take"):
        kind(table.parameters(), **KINDS[kind]).step()


@pytest.mark.parametrize("kind", KINDS)
def test_amsgrad_is_refused_as_a_runtime_error(kind: Any) -> None:
    with pytest.raises(NotAvailableError, match="does not support amsgrad=True") as raised:
        kind([nn.Parameter(torch.ones(2))], amsgrad=True)
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_flags_have_the_names_that_scripts_read(kind: Any) -> None:
    param = nn.Parameter(torch.ones(8))
    optimizer = kind([param], comm_backend_name="gloo", **KINDS[kind])
    assert not getattr(optimizer, FLAGS[kind])
    stepped(optimizer, param, 3)
    assert getattr(optimizer, FLAGS[kind])
    state = optimizer.state[param]
    assert {"step", "exp_avg", "exp_avg_sq"} <= set(state)
    if kind is OnebitLamb:
        assert {"scaling_coeff", "lamb_coeff_freeze", "last_factor"} <= set(state)
        assert optimizer.get_lamb_coeffs() == [state["lamb_coeff_freeze"] * state["last_factor"]]
        optimizer.get_lamb_coeffs().clear()
        assert len(optimizer.get_lamb_coeffs()) == 1, "a copy"


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_keeps_momentum_at_zero_and_is_the_scripts_own_after_a_load(kind: Any) -> None:
    param = nn.Parameter(torch.ones(4, 2))
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    optimizer = kind([{"params": [param], "exp_avg_mask": mask}], **KINDS[kind])
    stepped(optimizer, param, 4)
    masked = optimizer.state[param]["exp_avg"].view(4, 2)[[1, 3]]
    assert torch.equal(masked, torch.zeros(2, 2))
    other = kind([{"params": [param], "exp_avg_mask": torch.ones(4, 1)}], **KINDS[kind])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.param_groups[0]["exp_avg_mask"], torch.ones(4, 1))


def test_a_group_that_does_not_freeze_stays_plain_adam() -> None:
    freezing, plain = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    groups = [{"params": [freezing]}, {"params": [plain], "non_freeze": True}]
    optimizer = OnebitAdam(groups, freeze_step=2)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(4):
        freezing.grad = plain.grad = torch.randn(8, generator=generator)
        optimizer.step()
        squares.append([optimizer.state[p]["exp_avg_sq"].clone() for p in (freezing, plain)])
    assert torch.equal(squares[1][0], squares[3][0])
    assert not torch.equal(squares[1][1], squares[3][1])
