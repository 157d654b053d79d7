"""What a script does to gradients between backward and step has the effect that it has in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.utils import safe_get_full_fp32_param
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def masters(made: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, as this rank has it."""
    return {name: safe_get_full_fp32_param(param) for name, param in made.named_parameters()}


def leave_out(made: nn.Sequential) -> None:
    made[2].weight.grad = None
    made[2].bias.grad = None


def replace(made: nn.Sequential) -> None:
    for param in made.parameters():
        param.grad = param.grad * 0.5


def edit(made: nn.Sequential) -> None:
    for param in made.parameters():
        param.grad.mul_(0.5)


def clip(made: nn.Sequential) -> None:
    nn.utils.clip_grad_norm_(made.parameters(), 0.01)
    nn.utils.clip_grad_value_(made.parameters(), 0.005)


def regularise(made: nn.Sequential) -> None:
    (0.01 * sum(param.square().sum() for param in made.parameters())).backward()


def regularise_after_edits(made: nn.Sequential) -> None:
    replace(made)
    leave_out(made)
    regularise(made)


def regularise_some(made: nn.Sequential) -> None:
    made[0].bias.square().sum().backward()


EDITS: list[Callable[[Any], None]] = [
    leave_out, replace, edit, clip, regularise, regularise_after_edits, regularise_some,
]  # fmt: skip


def edited_steps(rank: int, world_size: int, name: str, precision: dict[str, Any]) -> list[dict[str, Tensor]]:
    change = next(edit for edit in EDITS if edit.__name__ == name)
    made = model()
    plain = copy.deepcopy(made)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.01, eps=1e-5)
    config = make_config(
        0, micro=4, optimizer={"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "eps": 1e-5}}, **precision
    )
    with engine_of(made, config) as engine:
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            plain(x).square().mean().backward()
            engine.backward(engine(x).square().mean())
            if step != 1:
                change(plain)
                change(made)
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
        return [masters(made), {name: param.detach() for name, param in plain.named_parameters()}]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", [edit.__name__ for edit in EDITS])
def test_at_stage_0_the_gradients_that_a_script_leaves_are_those_that_are_stepped(name: str, world_size: int) -> None:
    for found, expected in run_ranks(world_size, edited_steps, name, {}):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def reaches_nothing(rank: int, world_size: int, stage: int) -> list[dict[str, Tensor]]:
    """Rank 1's loss of the second step has nothing to do with the model."""
    made = model()
    plain = copy.deepcopy(made)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    config = make_config(stage, micro=4, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    with engine_of(made, config) as engine:
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            share = 0.5 if step == 1 else 1.0
            (plain(x).square().mean() * share).backward()
            loss = engine(x).square().mean()
            engine.backward(torch.ones((), requires_grad=True) * 2 if step == 1 and rank == 1 else loss)
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
        return [masters(made), {name: param.detach() for name, param in plain.named_parameters()}]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_whose_backward_reaches_no_parameter_sends_zeros(stage: int) -> None:
    for found, expected in run_ranks(2, reaches_nothing, stage, timeout=60):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def changed_accumulation(rank: int, world_size: int, stage: int) -> list[Any]:
    """Steps of 4, 3, 3 and 2 micro-batches, asked for between steps; the last change in the middle of one."""
    ends: list[int] = []
    with engine_of(model(), make_config(stage, micro=4, accumulation=4)) as engine:
        for number in (4, 3, 3, 2, 2):
            engine.set_train_batch_size(4 * world_size * number)
            for micro in range(number):
                before = engine.global_steps
                engine.backward(engine(torch.ones(4, 6)).square().mean())
                if len(ends) == 4 and micro == 0:
                    engine.set_train_batch_size(4 * world_size * 5)
                engine.step()
                if engine.global_steps > before:
                    ends.append(engine.micro_steps)
        return [ends, engine.gradient_accumulation_steps(), engine.global_samples // (4 * world_size)]


@pytest.mark.parametrize("stage", [0, 2])
def test_another_number_of_micro_batches_holds_from_the_next_step_on(stage: int) -> None:
    assert run_ranks(2, changed_accumulation, stage) == [[[4, 7, 10, 12, 14], 5, 14]] * 2
