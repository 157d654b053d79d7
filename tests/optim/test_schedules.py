from __future__ import annotations

import argparse
from collections.abc import Callable
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepspeed.optim import build_scheduler
from deepspeed.optim.schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    Schedule,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    add_tuning_arguments,
    get_config_from_args,
    get_lr_from_config,
)
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.optim.steps import parameters


def adamw(lr: float = 0.5, num_groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters(), "lr": lr * (i + 1)} for i in range(num_groups)], lr=lr)


def rates(schedule: Schedule, num_steps: int) -> list[float]:
    """The first group's learning rate as made, and after each step."""
    group = schedule.optimizer.param_groups[0]
    found = [group["lr"]]
    for _ in range(num_steps):
        schedule.step()
        found.append(group["lr"])
    return found


TABLE: list[tuple[Callable[[torch.optim.Optimizer], Schedule], list[float]]] = [
    (lambda o: LRRangeTest(o, 0.1, 2, 1.0), [0.1, 0.15, 0.2, 0.25]),
    (lambda o: LRRangeTest(o, 0.1, 2, 1.0, True), [0.1, 0.1, 0.2, 0.2]),
    (lambda o: OneCycle(o, 0.1, 0.5, cycle_first_step_size=2), [0.1, 0.3, 0.5, 0.3, 0.1, 0.1, 0.1]),
    (lambda o: OneCycle(o, 0.1, 0.5, 1.0, 1, 1, decay_step_size=2), [0.1, 0.5, 0.1, 0.1 / 1.5, 0.1 / 2]),
    (lambda o: WarmupLR(o, 0.0, 1.0, 4), [0, 0, 0.5, log(3) / log(4), 1, 1]),
    (lambda o: WarmupLR(o, 0.1, None, 4, "linear"), [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]),
    (lambda o: WarmupDecayLR(o, 6, 0.0, 1.0, 2, "linear"), [0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
    (lambda o: WarmupCosineLR(o, 4, 0.2, 2, 0.1, "linear"), [0, 0.1, 0.3, 0.275, 0.05, 0.05]),
]


@pytest.mark.parametrize(("make", "expected"), TABLE)
def test_learning_rates_follow_the_table(make: Any, expected: list[float]) -> None:
    assert rates(make(adamw(lr=0.5)), len(expected) - 1) == pytest.approx(expected)


@pytest.mark.parametrize(("make", "expected"), TABLE)
def test_a_loaded_schedule_continues_where_the_saved_one_was(make: Any, expected: list[float]) -> None:
    saved = make(adamw(lr=0.5))
    saved.step()
    assert saved.state_dict() == {"last_batch_iteration": 0}
    again = make(adamw(lr=0.5))
    again.load_state_dict(saved.state_dict())
    assert again.get_last_lr() == saved.get_last_lr()
    again.step()
    assert again.get_last_lr() == pytest.approx(expected[2:3])


@pytest.mark.parametrize(("make", "expected"), TABLE)
def test_a_step_may_be_named(make: Any, expected: list[float]) -> None:
    schedule = make(adamw(lr=0.5))
    schedule.step(2)
    assert schedule.get_lr() == schedule.get_last_lr() == pytest.approx([expected[3]])


def test_the_last_rate_before_any_step_asks_for_one() -> None:
    with pytest.raises(AssertionError, match="need to call step"):
        WarmupLR(adamw()).get_last_lr()


def test_momentum_moves_against_the_learning_rate_then_grows() -> None:
    optimizer = adamw()
    schedule = OneCycle(optimizer, 0.1, 0.5, 0.0, 1, 1, decay_step_size=2, decay_mom_rate=0.1)
    found = [optimizer.param_groups[0]["betas"]]
    for _ in range(4):
        schedule.step()
        found.append(optimizer.param_groups[0]["betas"])
    assert [beta1 for beta1, _ in found] == pytest.approx([0.9, 0.8, 0.9, 0.945, 0.99])
    assert {beta2 for _, beta2 in found} == {0.99}
    assert schedule.get_mom() == [found[-1]]


def test_momentum_is_left_alone_where_there_is_none(warnings: list[str]) -> None:
    schedule = OneCycle(torch.optim.SGD(parameters(), lr=0.1), 0.1, 0.5)
    assert schedule.get_mom() is None
    assert warnings == ["cycle_momentum of OneCycle has no effect: SGD has no betas. Set it to false."]


def test_groups_may_have_their_own_limits() -> None:
    optimizer = adamw(num_groups=2)
    WarmupLR(optimizer, [0.0, 0.1], [1.0, 2.0], 4).step(9)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]
    cosine = WarmupCosineLR(adamw(lr=0.5, num_groups=2), 4, warmup_num_steps=2)
    cosine.step(1)
    assert cosine.get_last_lr() == [0.5, 1.0]


def test_the_wrong_number_of_limits_is_named() -> None:
    with pytest.raises(ValueError, match=r"warmup_max_lr = \[1\.0, 2\.0, 3\.0\] has 3 values for 2 parameter groups"):
        WarmupLR(adamw(num_groups=2), warmup_max_lr=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda o: LRRangeTest(o, lr_range_test_step_size=0), "lr_range_test_step_size = 0"),
        (lambda o: OneCycle(o, 0.1, 0.2, cycle_first_step_size=0), "cycle_first_step_size = 0"),
        (lambda o: OneCycle(o, 0.1, 0.2, cycle_second_step_size=-1), "cycle_second_step_size = -1"),
        (lambda o: WarmupLR(o, warmup_num_steps=0), "warmup_num_steps = 0"),
        (lambda o: WarmupLR(o, warmup_num_steps=1.5), "warmup_num_steps = 1.5"),
        (lambda o: WarmupDecayLR(o, "auto"), "total_num_steps = 'auto'"),
        (lambda o: WarmupCosineLR(o, float("inf")), "total_num_steps = inf"),
    ],
)
def test_counts_must_be_whole_and_large_enough(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not a whole number of steps >= "):
        make(adamw())


def test_a_whole_float_is_a_count() -> None:
    assert WarmupLR(adamw(), warmup_num_steps=1e3).warmup_num_steps == 1000  # type: ignore[arg-type]


def test_an_unknown_warmup_type_warns_and_is_log(warnings: list[str]) -> None:
    assert WarmupLR(adamw(), warmup_type="cubic").warmup_type == "log"
    assert warnings == ['warmup_type = \'cubic\' is not "log" or "linear"; "log" is used.']


def test_training_shorter_than_the_warmup_warns(warnings: list[str]) -> None:
    WarmupDecayLR(adamw(), total_num_steps=5, warmup_num_steps=10)
    assert "total_num_steps = 5 is less than warmup_num_steps = 10" in warnings[0]


def test_the_optimizer_is_found_inside_wrappers() -> None:
    optimizer = adamw()
    WarmupLR(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)), 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("thing", [None, 3, SimpleNamespace(optimizer=None)])
def test_what_is_no_optimizer_is_a_type_error(thing: object) -> None:
    with pytest.raises(TypeError, match=r"is not a torch.optim.Optimizer, and has none in \.optimizer"):
        WarmupLR(thing)


def test_an_optimizer_that_replaces_its_groups_still_gets_its_rate() -> None:
    optimizer = adamw()
    schedule = WarmupLR(optimizer, 0.0, 1.0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step(5)
    assert optimizer.param_groups[0]["lr"] == 1.0


# From the configuration. --------------------------------------------------------------------------------------------


def test_the_names_accelerate_looks_for_are_these() -> None:
    assert VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


def test_a_schedule_is_built_by_name_also_from_numbers_in_strings() -> None:
    schedule = build_scheduler("WarmupLR", {"warmup_max_lr": "1e-2", "warmup_num_steps": "10"}, adamw())
    assert type(schedule) is WarmupLR
    assert (schedule.max_lrs, schedule.warmup_num_steps) == ([0.01], 10)


def test_other_names_are_torchs() -> None:
    optimizer = adamw(lr=0.5)
    schedule = build_scheduler("StepLR", {"step_size": 1}, SimpleNamespace(optimizer=optimizer))
    assert type(schedule) is torch.optim.lr_scheduler.StepLR
    assert type(build_scheduler("ReduceLROnPlateau", {}, optimizer)) is torch.optim.lr_scheduler.ReduceLROnPlateau


@pytest.mark.parametrize("name", ["WarmUpLR", "warmuplr"])
def test_an_unknown_name_gets_the_nearest_one(name: str) -> None:
    with pytest.raises(
        DeepSpeedConfigError, match=f"scheduler.type = \"{name}\" is not.*\n.*Did you mean .*'WarmupLR'"
    ):
        build_scheduler(name, {}, adamw())


@pytest.mark.parametrize("name", ["LRScheduler", "_LRScheduler", "Optimizer", "warnings"])
def test_what_is_no_schedule_in_torchs_module_is_unknown(name: str) -> None:
    with pytest.raises(AssertionError, match="is not a learning-rate schedule"):
        build_scheduler(name, {}, adamw())


def test_a_wrong_setting_names_the_key_and_the_nearest() -> None:
    with pytest.raises(
        DeepSpeedConfigError,
        match=r"scheduler.params.warmup_steps = 5: WarmupLR has no setting 'warmup_steps'.\n  Did you mean 'warmup_num_steps'",
    ):
        build_scheduler("WarmupLR", {"warmup_steps": 5}, adamw())


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(DeepSpeedConfigError, match="WarmupDecayLR needs total_num_steps"):
        build_scheduler("WarmupDecayLR", {}, adamw())


# From the command line. ---------------------------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    return add_tuning_arguments(argparse.ArgumentParser()).parse_args(words)


def test_arguments_become_a_section_that_builds() -> None:
    args = parse("--lr_schedule", "WarmupDecayLR", "--total_num_steps", "20", "--warmup_type", "linear")
    config, error = get_config_from_args(args)
    assert error is None
    assert config == {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 0.001,
            "warmup_num_steps": 1000,
            "warmup_type": "linear",
            "total_num_steps": 20,
        },
    }
    assert type(build_scheduler(config["type"], config["params"], adamw())) is WarmupDecayLR


@pytest.mark.parametrize("name", VALID_LR_SCHEDULES)
def test_every_schedule_can_be_made_from_the_command_line(name: str) -> None:
    config, _ = get_config_from_args(parse("--lr_schedule", name, "--total_num_steps", "2000"))
    assert config is not None
    assert type(build_scheduler(config["type"], config["params"], adamw())).__name__ == name


def test_defaults_on_the_command_line_are_their_own() -> None:
    args = parse()
    assert (args.lr_range_test_step_size, args.decay_step_size) == (1000, 1000)
    assert (args.warmup_min_ratio, args.cos_min_ratio) == (0.01, 0.01)


def test_no_schedule_or_an_unknown_one_gives_no_section() -> None:
    assert get_config_from_args(parse()) == (None, "--lr_schedule not specified on command line")
    assert get_config_from_args(argparse.Namespace())[0] is None
    config, error = get_config_from_args(parse("--lr_schedule", "Warmup"))
    assert config is None
    assert "Did you mean 'WarmupLR'" in str(error)


@pytest.mark.parametrize(
    ("config", "lr"),
    [
        ({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.1}}, 0.1),
        ({"type": "OneCycle", "params": {"cycle_max_lr": 0.2, "cycle_min_lr": 0.1}}, 0.2),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.3}}, 0.3),
    ],
)
def test_the_learning_rate_of_a_section_is_its_highest(config: dict[str, Any], lr: float) -> None:
    assert get_lr_from_config(config) == (lr, "")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "type not defined"),
        ({"type": "WarmupLR"}, "params not defined"),
        ({"type": "Cosine", "params": {}}, "not a valid LR schedule"),
        ({"type": "WarmupCosineLR", "params": {}}, "no learning rate"),
    ],
)
def test_a_section_without_a_learning_rate_says_why(config: dict[str, Any], words: str) -> None:
    lr, message = get_lr_from_config(config)
    assert lr is None
    assert words in message
