"""Against torch.optim.AdamW and Adam, and where torch has no such setting against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.optim import DeepSpeedCPUAdam, FusedAdam, kernels
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError
from tests.optim.sharded import step_shards
from tests.optim.steps import after_steps, assert_close, gradients, parameters, step, tensors

SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.1},
]
BOTH = pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam])


def mode_of(kind: type, decoupled: bool) -> dict[str, bool]:
    return {"adam_w_mode" if kind is FusedAdam else "adamw_mode": decoupled}


def by_formula(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool
) -> list[Tensor]:
    """Four steps in float64 without bias correction."""
    params = [tensor.double() for tensor in tensors()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for row in gradients(4):
        for p, (m, v), g in zip(params, moments, row, strict=True):
            g = g.double() if decoupled else g.double() + weight_decay * p
            m.mul_(betas[0]).add_((1 - betas[0]) * g)
            v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
            decay = weight_decay * p if decoupled else 0
            p.sub_(lr * (m / (v.sqrt() + eps) + decay))
    return params


@BOTH
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_steps_equal_those_of_torch(kind: type, settings: dict[str, Any], decoupled: bool) -> None:
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    defaults = {"weight_decay": 0.0}
    assert_close(
        after_steps(lambda p: kind(p, **mode_of(kind, decoupled), **settings)),
        after_steps(lambda p: theirs(p, **defaults | settings)),
    )


@BOTH
@pytest.mark.parametrize("decoupled", [True, False])
def test_without_bias_correction_moments_are_used_as_they_are(kind: type, decoupled: bool) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = after_steps(lambda p: kind(p, bias_correction=False, **mode_of(kind, decoupled), **settings))
    assert_close(ours, by_formula(decoupled=decoupled, **settings))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_foreach_form_equals_the_fused_one(decoupled: bool, bias_correction: bool) -> None:
    def three_steps(kernel: Any) -> list[Tensor]:
        params, m, v = tensors(), tensors(seed=1), [t.square() for t in tensors(seed=2)]
        steps = [torch.zeros(()) for _ in params]
        for row in gradients(3):
            kernels.count_steps_(steps)
            kernel(params, row, m, v, steps, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
                   decoupled=decoupled, bias_correction=bias_correction)  # fmt: skip
        return [*params, *m, *v]

    assert_close(three_steps(kernels.adam_foreach_), three_steps(kernels.adam_))


@BOTH
def test_runs_of_several_parameters_step_as_the_parameters_do(kind: type) -> None:
    ours, _ = step_shards(lambda g: kind(g, lr=0.01), [{"params": parameters()}], gradients(3), cuts=[10, 33])
    assert_close(ours, after_steps(lambda p: kind(p, lr=0.01), 3))


@BOTH
def test_state_has_torchs_keys_and_loads_into_torchs_optimizer(kind: type) -> None:
    ours, theirs = kind(parameters()), torch.optim.AdamW(parameters(), weight_decay=0.0)
    step(ours, gradients(2))
    theirs.load_state_dict({**theirs.state_dict(), "state": ours.state_dict()["state"]})
    assert set(ours.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    expected = step(torch.optim.AdamW(parameters(), weight_decay=0.0), gradients(3))
    for param, now in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        param.data.copy_(now)
    assert_close(step(theirs, gradients(3)[2:]), expected)


def test_moments_of_bf16_parameters_are_those_of_fp32_ones() -> None:
    rows = gradients(3, dtype=torch.bfloat16)
    low, wide = DeepSpeedCPUAdam(parameters(dtype=torch.bfloat16)), DeepSpeedCPUAdam(parameters())
    step(low, rows)
    step(wide, [[grad.float() for grad in row] for row in rows])
    for ours, theirs in zip(low.state.values(), wide.state.values(), strict=True):
        assert_close([ours["exp_avg"], ours["exp_avg_sq"]], [theirs["exp_avg"], theirs["exp_avg_sq"]])


def test_moments_may_have_the_parameters_dtype() -> None:
    optimizer = DeepSpeedCPUAdam(parameters(dtype=torch.bfloat16), fp32_optimizer_states=False)
    step(optimizer, gradients(1, dtype=torch.bfloat16))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


def test_loading_keeps_fp32_moments_beside_bf16_parameters() -> None:
    optimizer = DeepSpeedCPUAdam(parameters(dtype=torch.bfloat16))
    step(optimizer, gradients(3, dtype=torch.bfloat16))
    again = DeepSpeedCPUAdam(parameters(dtype=torch.bfloat16))
    again.load_state_dict(optimizer.state_dict())
    saved, loaded = optimizer.state_dict()["state"][0], again.state_dict()["state"][0]
    assert loaded["exp_avg"].dtype is torch.float32
    assert torch.equal(saved["exp_avg"], loaded["exp_avg"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_step_close_to_fp32(kind: type, dtype: torch.dtype) -> None:
    ours = after_steps(lambda p: kind(p, lr=0.01), 3, dtype=dtype)
    assert all(param.dtype is dtype for param in ours)
    assert_close(ours, after_steps(lambda p: kind(p, lr=0.01), 3), rtol=0.05, atol=0.05)


def test_groups_may_mix_dtypes() -> None:
    params = [*parameters([(3,)]), *parameters([(3,)], dtype=torch.bfloat16)]
    rows = [[torch.ones(3), torch.ones(3, dtype=torch.bfloat16)]]
    before = [param.detach().clone() for param in params]
    after = step(FusedAdam(params, lr=0.125), rows)
    assert_close(after, [p - 0.125 for p in before], rtol=1e-2, atol=1e-2)


def test_a_gradient_in_another_memory_order_reaches_its_own_elements() -> None:
    grad = torch.arange(12.0).view(4, 3).t()
    param = nn.Parameter(torch.zeros(3, 4))
    param.grad = grad
    optimizer = FusedAdam([param])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * grad)


@BOTH
def test_parameters_without_gradient_stay_and_get_no_state(kind: type) -> None:
    params = parameters([(2,), (2,)])
    params[0].grad = torch.ones(2)
    optimizer = kind(params)
    optimizer.step()
    assert params[1] not in optimizer.state


@BOTH
def test_groups_of_another_optimizer_with_foreign_keys_are_accepted(kind: type) -> None:
    other = torch.optim.AdamW(parameters(), lr=0.25, fused=True)
    torch.optim.lr_scheduler.ConstantLR(other)
    assert "initial_lr" in other.param_groups[0]
    ours = step(kind(other.param_groups, lr=9.0, weight_decay=9.0), gradients(2))
    theirs = step(torch.optim.AdamW(parameters(), lr=other.param_groups[0]["lr"]), gradients(2))
    assert_close(ours, theirs)


def test_a_closure_is_evaluated_with_gradients() -> None:
    param = nn.Parameter(torch.ones(1))

    def closure() -> Tensor:
        loss = (param * 3).sum()
        loss.backward()
        return loss

    assert FusedAdam([param], lr=0.5).step(closure).item() == 3.0
    assert param.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["grads", "output_params", "scale", "grad_norms", "grad_scaler"])
def test_arguments_of_the_old_interface_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="takes only a closure"):
        FusedAdam(parameters()).step(**{name: 1})


@BOTH
def test_amsgrad_is_a_runtime_error(kind: type) -> None:
    with pytest.raises(RuntimeError, match="does not support amsgrad=True") as caught:
        kind(parameters(), amsgrad=True)
    assert isinstance(caught.value, NotAvailableError)


def test_zero_grad_does_as_the_constructor_or_the_call_says() -> None:
    (param,) = parameters([(2,)])
    for set_grad_none, argument, is_none in ((True, None, True), (False, None, False), (False, True, True)):
        param.grad = torch.ones(2)
        FusedAdam([param], set_grad_none=set_grad_none).zero_grad(argument)
        assert (param.grad is None) is is_none


@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_rollback_restores_parameter_and_state(adamw_mode: bool, bias_correction: bool) -> None:
    params = [nn.Parameter(tensor) for tensor in tensors(dtype=torch.float64)]
    optimizer = DeepSpeedCPUAdam(
        params, lr=0.01, weight_decay=0.1, adamw_mode=adamw_mode, bias_correction=bias_correction
    )
    step(optimizer, gradients(2, dtype=torch.float64))
    target = params[2]
    before = [t.clone() for t in (target.detach(), *optimizer.state[target].values())]
    untouched = params[0].detach().clone()
    target.grad = torch.full_like(target, 0.3)
    optimizer.step_subgroup(2)
    assert not torch.allclose(target, before[0])
    optimizer.rollback_subgroup(2)
    assert_close([target.detach(), *optimizer.state[target].values()], before, atol=1e-10)
    assert torch.equal(params[0], untouched)


def test_rollback_without_a_step_is_refused() -> None:
    optimizer = DeepSpeedCPUAdam(parameters())
    with pytest.raises(DeepSpeedError, match=r"rollback_subgroup\(0\): there is no step to undo"):
        optimizer.rollback_subgroup(0)
    with pytest.raises(DeepSpeedError, match="sub-group 9 does not exist: this optimizer has 4 tensors"):
        optimizer.step_subgroup(9)


def test_the_cpu_optimizer_refuses_tensors_elsewhere() -> None:
    param = nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(AssertionError, match="main memory, this one is on meta"):
        DeepSpeedCPUAdam([param]).step()
