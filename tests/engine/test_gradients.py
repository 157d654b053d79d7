"""What a script does to gradients between backward and step has the effect that it has in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.errors import ShardError, TrainingStateError
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


def edited_steps(rank: int, world_size: int, name: str, stage: int) -> list[dict[str, Tensor]]:
    change = next(edit for edit in EDITS if edit.__name__ == name)
    made = model()
    plain = copy.deepcopy(made)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.01, eps=1e-5)
    config = make_config(
        stage, micro=4, optimizer={"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "eps": 1e-5}}
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
    for found, expected in run_ranks(world_size, edited_steps, name, 0):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", [edit.__name__ for edit in EDITS])
def test_one_rank_has_whole_gradients_at_stages_1_and_2_too(name: str, stage: int) -> None:
    ((found, expected),) = run_ranks(1, edited_steps, name, stage)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def halve_through_data(made: nn.Sequential) -> None:
    for param in made.parameters():
        param.grad.data.mul_(0.5)


def halved(rank: int, world_size: int, by_script: bool) -> dict[str, Tensor]:
    """bf16 parameters whose gradients add up in fp32; halved by the script, or by the loss."""
    made = model()
    wide = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config = make_config(0, micro=4, accumulation=2, optimizer={"type": "SGD", "params": {"lr": 0.1}}, **wide)
    with engine_of(made, config) as engine:
        for step in range(4):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
            engine.backward(engine(x).square().mean() * (1.0 if by_script else 0.5))
            if step % 2:
                assert all(param.grad.dtype == torch.bfloat16 for param in made.parameters())
                if by_script:
                    halve_through_data(made)
            engine.step()
        return masters(made)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_add_up_in_another_dtype_are_shown_in_the_parameters(world_size: int) -> None:
    edited, expected = (run_ranks(world_size, halved, by_script) for by_script in (True, False))
    for key, value in expected[0].items():
        torch.testing.assert_close(edited[0][key], value, rtol=4e-3, atol=4e-4)


def assigned(rank: int, world_size: int, stage: int, per_rank: float) -> list[Any]:
    """One SGD step on gradients that the script made up, where none are shown."""
    made = model()
    config = make_config(stage, micro=4, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    with engine_of(made, config) as engine:
        before = {name: value.clone() for name, value in masters(made).items()}
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        with deepspeed.zero.GatheredParameters(list(made.parameters())):
            made[0].weight.grad = torch.arange(36.0).view(6, 6) + per_rank * rank
            made[2].bias.grad = torch.full((3,), 2.0)
        engine.step()
        after = masters(made)
        engine.backward(engine(torch.ones(4, 6)).square().mean() * 0.0)
        engine.step()
        again = masters(made)
        assert all(param.grad is None for param in made.parameters())
        return [{name: before[name] - after[name] for name in after}, {n: after[n] - again[n] for n in after}]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_a_script_assigns_are_stepped_where_none_are_shown(stage: int) -> None:
    for steps, afterwards in run_ranks(2, assigned, stage, 0.0):
        torch.testing.assert_close(steps["0.weight"], torch.arange(36.0).view(6, 6), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(steps["2.bias"], torch.full((3,), 2.0), rtol=1e-5, atol=1e-5)
        assert steps["2.weight"].abs().max() < 2.0
        assert all(not change.any() for change in afterwards.values()), "an assigned gradient was stepped twice"


def assigned_differently(rank: int, world_size: int, stage: int) -> str:
    with pytest.raises(TrainingStateError) as caught:
        assigned(rank, world_size, stage, 1.0)
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_ranks_assign_differently_are_refused_by_name_on_each(stage: int) -> None:
    for words in run_ranks(2, assigned_differently, stage):
        assert "0.weight was given a gradient of (6, 6)" in words
        assert f"ZeRO stage {stage}" in words


def assigned_outside(rank: int, world_size: int, offload: dict[str, Any]) -> list[str]:
    """What a sharded parameter says to a gradient of its full shape; and that training goes on after it."""
    made, words = model(), []
    config = make_config(3, micro=4, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **offload}
    with engine_of(made, config) as engine:
        for _ in range(2):
            engine.backward(engine(torch.ones(4, 6)).square().mean())
            with pytest.raises(ShardError) as caught:
                made[0].weight.grad = torch.ones(6, 6)
            words.append(str(caught.value))
            deepspeed.utils.safe_set_full_grad(made[0].weight, torch.ones(6, 6))
            before = masters(made)["0.weight"].clone()
            engine.step()
            torch.testing.assert_close(before - masters(made)["0.weight"], torch.ones(6, 6))
    return words


@pytest.mark.parametrize("offload", [{}, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_given_to_a_sharded_parameter_is_refused_with_the_call_that_does_it(
    world_size: int, offload: dict[str, Any]
) -> None:
    for rank, words in enumerate(run_ranks(world_size, assigned_outside, offload)):
        for told in words:
            assert f"[rank {rank}]: 0.weight is sharded and cannot be used in 'param.grad = ...'" in told
            assert "safe_set_full_grad(param, gradient)" in told


def hooked(rank: int, world_size: int, stage: int, when: str) -> list[Any]:
    """Hooks of each kind that keep what they see and double it; beside plain PyTorch on this rank's data and on all."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            seen[f"{name} arriving"] = gradient.clone()
            return gradient * 2

        return hook

    def keep_and_double(name: str) -> Callable[[nn.Parameter], None]:
        def hook(param: nn.Parameter) -> None:
            assert param.grad is not None
            seen[name] = param.grad.clone()
            param.grad.mul_(2)

        return hook

    def attach(module: nn.Module) -> None:
        for name, param in module.named_parameters():
            param.register_hook(keep(name))
            param.register_post_accumulate_grad_hook(keep_and_double(name))

    made = model()
    plain = copy.deepcopy(made)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    if when == "before":
        attach(made)
    with engine_of(made, make_config(stage, micro=4, optimizer={"type": "SGD", "params": {"lr": 0.1}})) as engine:
        if when == "after":
            attach(made)
        for step in range(2):
            local, *others = [
                torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + (rank + i) % world_size))
                for i in range(world_size)
            ]
            plain(local).square().mean().backward()
            expected = {name: param.grad.clone() for name, param in plain.named_parameters()}
            for x in others:
                plain(x).square().mean().backward()
            for param in plain.parameters():
                param.grad.mul_(4 / world_size)
            engine.backward(engine(local).square().mean())
            for name, gradient in expected.items():
                torch.testing.assert_close(seen[f"{name} arriving"], gradient, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(seen[name], gradient * 2, rtol=1e-5, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
        return [masters(made), {name: param.detach() for name, param in plain.named_parameters()}]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hooks_of_the_script_see_and_edit_the_gradient_of_their_rank(stage: int, when: str) -> None:
    for world_size in (1, 2):
        for found, expected in run_ranks(world_size, hooked, stage, when):
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def reaches_nothing(rank: int, world_size: int, stage: int, is_plain: bool, accumulation: int) -> list[Any]:
    """Rank 1's loss of the second step's last micro-batch has nothing to do with the model."""
    made = model()
    plain = copy.deepcopy(made)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    config = make_config(stage, micro=4, accumulation=accumulation, optimizer={"type": "SGD", "params": {"lr": 0.1}})
    with engine_of(made, config) as engine:
        for micro in range(3 * accumulation):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(micro))
            is_odd = micro == 2 * accumulation - 1
            (plain(x).square().mean() * (0.5 if is_odd else 1.0) / accumulation).backward()
            loss = engine(x).square().mean()
            if is_odd and rank == 1:
                loss = torch.ones((), requires_grad=True) * 2
            if is_plain:
                (loss / accumulation).backward()
            else:
                engine.backward(loss)
            if (micro + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
            engine.step()
        return [masters(made), {name: param.detach() for name, param in plain.named_parameters()}]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_whose_backward_reaches_no_parameter_sends_zeros(stage: int, is_plain: bool, accumulation: int) -> None:
    for found, expected in run_ranks(2, reaches_nothing, stage, is_plain, accumulation, timeout=60):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def steps_without_backward(rank: int, world_size: int, stage: int) -> list[Any]:
    made = model()
    with engine_of(made, make_config(stage, micro=4)) as engine:
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        engine.step()
        before = masters(made)
        with pytest.raises(TrainingStateError, match="before backward"):
            engine.step()
        after = masters(made)
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        engine.step()
        return [all(before[name].equal(after[name]) for name in before), engine.global_steps]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_without_any_backward_is_refused_on_every_rank_and_changes_nothing(stage: int) -> None:
    for world_size in (1, 2):
        assert run_ranks(world_size, steps_without_backward, stage, timeout=60) == [[True, 2]] * world_size


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


def gives_to_idle_ones(rank: int, world_size: int, stage: int, is_frozen: bool) -> None:
    """A weight that no backward reaches is given a gradient in two of four steps, frozen or not."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[0].requires_grad_(not is_frozen)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9) for made in (plain, model)]
    config = make_config(stage, micro=2, zero={"stage3_param_persistence_threshold": 0})
    del config["optimizer"]
    with engine_of(model, config, optimizer=optimizers[1]) as engine:
        for i in range(4):
            x = torch.randn(2, 8, generator=torch.Generator().manual_seed(i))
            plain[1](x).square().mean().backward()
            with deepspeed.zero.GatheredParameters(list(model[1].parameters()) if stage == 3 else []):
                engine.backward(model[1](x).square().mean())
            if i in (1, 3):
                with deepspeed.zero.GatheredParameters([model[0].weight]):
                    for made in (plain, model):
                        made[0].weight.grad = torch.full((8, 8), 0.1)
            optimizers[0].step()
            optimizers[0].zero_grad()
            engine.step()
        for name, value in masters(model).items():
            if value is not None:
                torch.testing.assert_close(value, plain.get_parameter(name).detach())
        assert safe_get_full_fp32_param(model[0].weight) is not None


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_given_to_what_no_backward_reaches_are_stepped(stage: int, world_size: int, is_frozen: bool) -> None:
    run_ranks(world_size, gives_to_idle_ones, stage, is_frozen)


def _exchange(model: nn.Module) -> None:
    model[0].weight.grad, model[2].weight.grad = model[2].weight.grad, model[0].weight.grad


def _transpose(model: nn.Module) -> None:
    model[0].weight.grad = model[0].weight.grad.t()


def _give_away(model: nn.Module) -> None:
    model[2].weight.grad, model[0].weight.grad = model[0].weight.grad, None


def _give_data_away(model: nn.Module) -> None:
    first, last = model[0].weight.grad, model[2].weight.grad
    first.data, last.data = last.data, first.data.t() * 0.5


def _cut_off(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad.detach_().mul_(0.5)


def _give_sparse(model: nn.Module) -> None:
    model[0].weight.grad = model[0].weight.grad.to_sparse()


def moves_gradients(rank: int, world_size: int, edit: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = deepspeed.initialize(model=model, config={**config, "gradient_clipping": 0.0})
    for i in range(3):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(i))
        (plain(x) - 1).pow(2).mean().backward()
        engine.backward((engine(x) - 1).pow(2).mean())
        edit(plain)
        edit(engine.module)
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    for here, there in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(here, there)
    engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("edit", [_exchange, _transpose, _give_away, _give_data_away, _cut_off, _give_sparse])
def test_gradients_may_be_exchanged_and_transposed(edit: Callable[[nn.Module], None], world_size: int) -> None:
    run_ranks(world_size, moves_gradients, edit)
