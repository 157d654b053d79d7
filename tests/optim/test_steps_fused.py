"""`step_fused`: the step of offloaded runs equals `step`, writes the low-precision copies, and owns no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.kernels import native
from deepspeed.optim import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    DeepSpeedCPUSGD,
    FusedLamb,
    FusedRun,
    StepsFused,
)
from deepspeed.utils.errors import DeepSpeedError

Make = Callable[[Any], Any]

MAKERS: dict[str, Make] = {
    "adam": lambda p: DeepSpeedCPUAdam(p, lr=0.01, weight_decay=0.1),
    "adam-l2": lambda p: DeepSpeedCPUAdam(p, lr=0.01, weight_decay=0.1, adamw_mode=False, bias_correction=False),
    "lion": lambda p: DeepSpeedCPULion(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: DeepSpeedCPUAdagrad(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: DeepSpeedCPUSGD(p, lr=0.01, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "lamb": lambda p: FusedLamb(p, lr=0.01, weight_decay=0.1),
}
ELEMENTWISE = [name for name in MAKERS if name != "lamb"]
NUMELS = (5, 40_001)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(native, "PATH", native.PATH.with_name("gone.so"))
    native._load.cache_clear()
    yield str(request.param)
    native._load.cache_clear()


def masters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(numel, generator=generator)) for numel in NUMELS]


def grads(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(numel, generator=generator).to(dtype) for numel in NUMELS]


def lows(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(numel, dtype=dtype) for numel in NUMELS]


def runs_of(
    optimizer: Any, step: int, low: list[Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> list[Any]:
    (group,) = optimizer.param_groups
    members = zip(group["params"], grads(step, dtype), low or [None] * len(NUMELS), strict=True)
    return [(group, FusedRun(*tensors)) for tensors in members]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_equals_step_with_wide_unscaled_gradients_and_a_cast(name: str, dtype: torch.dtype, path: str) -> None:
    plain, fused, low = MAKERS[name](masters()), MAKERS[name](masters()), lows()
    assert isinstance(fused, StepsFused)
    for step in range(3):
        for param, grad in zip(plain.param_groups[0]["params"], grads(step, dtype), strict=True):
            param.grad = grad.float() * 0.25
        plain.step()
        fused.step_fused(runs_of(fused, step, low, dtype), 0.25)
    for ours, theirs, copy in zip(fused.param_groups[0]["params"], plain.param_groups[0]["params"], low, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(copy, ours.detach().bfloat16())
        assert all(torch.equal(fused.state[ours][key], value) for key, value in plain.state[theirs].items())


@pytest.mark.parametrize("name", MAKERS)
def test_both_paths_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for library in (native._load(), (None, "it is not there")):
        monkeypatch.setattr(native, "_load", lambda library=library: library)
        optimizer, low = MAKERS[name](masters()), lows(torch.float16)
        for step in range(3):
            optimizer.step_fused(runs_of(optimizer, step, low, torch.bfloat16), 0.5)
        results.append([p.detach() for p in optimizer.param_groups[0]["params"]] + [t.float() for t in low])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_runs_count_their_own_steps_and_sub_groups_step_alone(name: str) -> None:
    together, apart = MAKERS[name](masters()), MAKERS[name](masters())
    for step in range(2):
        together.step_fused(runs_of(together, step), 1.0)
        for run in reversed(runs_of(apart, step)):
            apart.step_fused([run], 1.0)
    for ours, theirs in zip(apart.param_groups[0]["params"], together.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)
        assert apart.state[ours]["step"].item() == 2


@pytest.mark.parametrize("name", MAKERS)
def test_state_may_be_replaced_between_steps(name: str) -> None:
    kept, moved = MAKERS[name](masters()), MAKERS[name](masters())
    for step in range(3):
        for optimizer in (kept, moved):
            optimizer.step_fused(runs_of(optimizer, step), 1.0)
        for master in moved.param_groups[0]["params"]:
            for key in moved.state_names:
                buffer = torch.full((master.numel() + 3,), torch.nan)
                moved.state[master][key] = buffer[3:].copy_(moved.state[master][key])
    for ours, theirs in zip(moved.param_groups[0]["params"], kept.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_is_what_was_announced(name: str) -> None:
    optimizer = MAKERS[name](masters())
    announced = optimizer.state_names
    optimizer.step_fused(runs_of(optimizer, 0), 1.0)
    for master in optimizer.param_groups[0]["params"]:
        held = {key: value.dtype for key, value in optimizer.state[master].items() if key != "step"}
        assert held == announced
        assert optimizer.state[master]["step"].shape == ()


def test_low_precision_states_of_fp32_masters_are_bf16() -> None:
    optimizer = DeepSpeedCPUAdam(masters(), fp32_optimizer_states=False)
    assert optimizer.state_names == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    optimizer.step_fused(runs_of(optimizer, 0, lows()), 1.0)
    assert {t.dtype for s in optimizer.state.values() for k, t in s.items() if k != "step"} == {torch.bfloat16}


def test_zeros_put_there_before_the_first_step_are_the_state() -> None:
    optimizer, expected = DeepSpeedCPUAdam(masters()), DeepSpeedCPUAdam(masters())
    for master in optimizer.param_groups[0]["params"]:
        optimizer.state[master] = {key: torch.zeros(master.numel()) for key in optimizer.state_names}
    reserved = [state["exp_avg"].data_ptr() for state in optimizer.state.values()]
    for each in (optimizer, expected):
        each.step_fused(runs_of(each, 0), 1.0)
    assert [state["exp_avg"].data_ptr() for state in optimizer.state.values()] == reserved
    assert torch.equal(optimizer.param_groups[0]["params"][1], expected.param_groups[0]["params"][1])


def test_groups_keep_their_settings() -> None:
    first, second = masters()
    optimizer = DeepSpeedCPUSGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.0}])
    before = [p.detach().clone() for p in (first, second)]
    groups = optimizer.param_groups
    optimizer.step_fused(
        [(g, FusedRun(p, torch.ones_like(p))) for g, p in zip(groups, (first, second), strict=True)], 2.0
    )
    assert torch.equal(first, before[0] - 2)
    assert torch.equal(second, before[1])


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    for name in MAKERS:
        optimizer = MAKERS[name](masters())
        optimizer.param_groups[0]["lr"] = 0.0
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        optimizer.step_fused([(g, FusedRun(r.master, r.grad * 0)) for g, r in runs_of(optimizer, 0)], 1.0)
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], before)), name


@pytest.mark.parametrize("name", MAKERS)
def test_no_runs_and_empty_runs_are_fine(name: str) -> None:
    optimizer = MAKERS[name]([nn.Parameter(torch.zeros(0))])
    optimizer.step_fused([], 1.0)
    (group,) = optimizer.param_groups
    optimizer.step_fused([(group, FusedRun(group["params"][0], torch.zeros(0)))], 1.0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("grad", "low", "words"),
    [
        (torch.zeros(3), None, r"step_fused: grad has shape \(3,\)"),
        (torch.zeros(2), torch.zeros(4)[::2], r"step_fused: low has shape \(2,\) and stride \(2,\)"),
        (torch.zeros(2, device="meta"), None, "updates parameters in main memory, this one is on meta"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, grad: Tensor, low: Tensor | None, words: str) -> None:
    optimizer = MAKERS[name]([nn.Parameter(torch.zeros(2))])
    (group,) = optimizer.param_groups
    with pytest.raises(DeepSpeedError, match=words):
        optimizer.step_fused([(group, FusedRun(group["params"][0], grad, low))], 1.0)


def test_without_the_library_one_line_says_what_is_slower(warnings: list[str], path: str) -> None:
    optimizer = DeepSpeedCPUAdam(masters())
    for step in range(2):
        optimizer.step_fused(runs_of(optimizer, step), 1.0)
    if path == "compiled":
        assert warnings == []
    else:
        (text,) = warnings
        assert text.startswith("CPU optimizers step on torch's kernels, with more passes over memory: ")
        assert text.endswith("Install a C++ compiler (g++ or clang++) and install deepspeed again.")
