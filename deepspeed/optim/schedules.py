"""Learning-rate schedules: LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR.

Made by the engine from `scheduler` in the configuration (`build_scheduler`) or by the user; stepped by the engine once
per optimizer step that was not skipped. The formulas are in `schedule_formulas`.

A schedule sets the learning rate for t = -1 when it is made, and for t = 0, 1, ... at each `step()`. Its whole state
is t (`last_batch_iteration`). These are not torch schedulers: other libraries recognise them by class name.

Invariant: learning rates depend on t and on what the constructor was given, never on how t was reached.
"""

from __future__ import annotations

import abc
import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deepspeed.optim import schedule_formulas as formulas
from deepspeed.optim.arguments import construct, did_you_mean, read_numbers
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, TrainingStateError
from deepspeed.utils.logging import warn_once

PerGroup = float | Sequence[float]
"""One value for all parameter groups, or one for each."""


class Schedule(abc.ABC):
    """Base of the five: counts steps and writes learning rates into the optimizer's parameter groups.

    The optimizer is a torch one, or a wrapper with it in `.optimizer`. A constructor ends with `_apply()`.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abc.abstractmethod
    def get_lr(self) -> list[float]:
        """The learning rate of each group at `last_batch_iteration`."""

    def step(self, batch_iteration: int | None = None) -> None:
        """Go to the next step, or to `batch_iteration`, and set the learning rates for it."""
        self.last_batch_iteration = self.last_batch_iteration + 1 if batch_iteration is None else batch_iteration
        self._last_lr = self._apply()

    def get_last_lr(self) -> list[float]:
        """The learning rates last set. Raises TrainingStateError (an AssertionError) before the first step."""
        if self._last_lr is None:
            raise TrainingStateError("need to call step() of the learning-rate schedule before get_last_lr().")
        return self._last_lr

    def state_dict(self) -> dict[str, int]:
        """The step count; everything else comes from the constructor."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. The optimizer's learning rates come back with the optimizer."""
        self.last_batch_iteration = sd["last_batch_iteration"]
        self._last_lr = self.get_lr() if self.last_batch_iteration >= 0 else None

    def _apply(self) -> list[float]:
        rates = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = lr
        return rates

    def _per_group(self, name: str, value: PerGroup) -> list[float]:
        num_groups = len(self.optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [value] * num_groups  # type: ignore[list-item]
        if len(value) != num_groups:
            raise DeepSpeedError(
                f"{name} = {list(value)} has {len(value)} values for {num_groups} parameter groups.\n"
                "  Give one value per group, or one for all."
            )
        return list(value)


class LRRangeTest(Schedule):
    """Grow the learning rate from a minimum without end, to see where training stops improving."""

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._apply()

    def get_lr(self) -> list[float]:
        """min * (1 + rate * (t+1)/step_size)."""
        factor = formulas.range_test_factor(self.last_batch_iteration, self.step_size, self.step_rate, self.staircase)
        return [low * factor for low in self.min_lr]


class OneCycle(Schedule):
    """One rise and fall of the learning rate, then decay; beta1 moves the other way where there is one."""

    _BETA2 = 0.99

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self._per_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self._per_group("cycle_max_lr", cycle_max_lr)
        self.decay_lr_rate = decay_lr_rate
        first = _count("cycle_first_step_size", cycle_first_step_size)
        second = first if cycle_second_step_size is None else cycle_second_step_size
        self.first_size, self.second_size = first, _count("cycle_second_step_size", second, minimum=0)
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.decay_step_size = _count("decay_step_size", decay_step_size, minimum=0)
        self.min_moms = self._per_group("cycle_min_mom", cycle_min_mom)
        self.max_moms = self._per_group("cycle_max_mom", cycle_max_mom)
        self.decay_mom_rate = decay_mom_rate
        self.cycle_momentum = cycle_momentum and "betas" in self.optimizer.defaults
        if cycle_momentum and not self.cycle_momentum:
            name = type(self.optimizer).__name__
            warn_once(f"cycle_momentum of OneCycle has no effect: {name} has no betas. Set it to false.")
        self._apply()

    def get_lr(self) -> list[float]:
        """Between the minimum and the maximum during the cycle, below the minimum while decaying."""
        if self._is_decaying:
            decay = 1 + self._decay(self.decay_lr_rate)
            return [low / decay for low in self.min_lrs]
        return _between(self.min_lrs, self.max_lrs, self._cycle_factor)

    def get_mom(self) -> list[tuple[float, float]] | None:
        """(beta1, beta2) of each group; None where momentum is not cycled."""
        if not self.cycle_momentum:
            return None
        if self._is_decaying:
            decay = 1 + self._decay(self.decay_mom_rate)
            moms = [high * decay for high in self.max_moms]
        else:
            moms = _between(self.max_moms, self.min_moms, self._cycle_factor)
        return [(mom, self._BETA2) for mom in moms]

    @property
    def _is_decaying(self) -> bool:
        return self.last_batch_iteration >= self.first_size + self.second_size

    @property
    def _cycle_factor(self) -> float:
        return formulas.cycle_factor(
            self.last_batch_iteration,
            self.first_size,
            self.second_size,
            self.first_stair_count,
            self.second_stair_count,
        )

    def _decay(self, rate: float) -> float:
        total = self.first_size + self.second_size
        return formulas.cycle_decay(self.last_batch_iteration, total, rate, self.decay_step_size)

    def _apply(self) -> list[float]:
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or (), strict=False):
            group["betas"] = betas
        return super()._apply()


class WarmupLR(Schedule):
    """Rise to the maximum (default: each group's own learning rate), then stay."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        top = [group["lr"] for group in self.optimizer.param_groups] if warmup_max_lr is None else warmup_max_lr
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", top)
        self.warmup_num_steps = _count("warmup_num_steps", warmup_num_steps)
        self.warmup_type = _warmup_type(warmup_type)
        self._apply()

    def get_lr(self) -> list[float]:
        """min + (max - min) * warmup_factor(t)."""
        factor = formulas.warmup_factor(self.last_batch_iteration, self.warmup_num_steps, self.warmup_type)
        return _between(self.min_lrs, self.max_lrs, factor)


class WarmupDecayLR(Schedule):
    """Rise to the maximum, then fall in a straight line to the minimum at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps = _count("warmup_num_steps", warmup_num_steps)
        self.total_num_steps = _total(total_num_steps, self.warmup_num_steps)
        self.warmup_type = _warmup_type(warmup_type)
        self._apply()

    def get_lr(self) -> list[float]:
        """min + (max - min) * warmup_decay_factor(t)."""
        factor = formulas.warmup_decay_factor(
            self.last_batch_iteration, self.warmup_num_steps, self.total_num_steps, self.warmup_type
        )
        return _between(self.min_lrs, self.max_lrs, factor)


class WarmupCosineLR(Schedule):
    """Raise each group's own learning rate from a part of it to all of it, then lower it along half a cosine."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.org_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.warmup_num_steps = _count("warmup_num_steps", warmup_num_steps)
        self.total_num_steps = _total(total_num_steps, self.warmup_num_steps)
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = _warmup_type(warmup_type)
        self._apply()

    def get_lr(self) -> list[float]:
        """The learning rates the optimizer came with, times warmup_cosine_factor(t)."""
        ratio = formulas.warmup_cosine_factor(
            self.last_batch_iteration,
            self.warmup_num_steps,
            self.total_num_steps,
            self.warmup_type,
            self.warmup_min_ratio,
            self.cos_min_ratio,
        )
        return [lr * ratio for lr in self.org_lrs]


_SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(_SCHEDULES)
"""Class names by which Accelerate decides that a schedule is DeepSpeed's to step."""


def build_scheduler(type_name: str, params: Mapping[str, Any], optimizer: Any) -> Any:
    """The schedule named `type_name`: one of the five above, else a class of torch.optim.lr_scheduler.

    Raises DeepSpeedConfigError for an unknown name, and for keys and values its constructor does not take.
    """
    module = torch.optim.lr_scheduler
    bases = (module.LRScheduler, module.ReduceLROnPlateau)
    classes: dict[str, type] = {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, bases) and not name.startswith("_") and kind is not bases[0]
    }
    known = {**classes, **_SCHEDULES}
    if type_name not in known:
        raise DeepSpeedConfigError(
            f'scheduler.type = "{type_name}" is not a learning-rate schedule.\n'
            f"  {did_you_mean(type_name, known)}Use one of {', '.join(VALID_LR_SCHEDULES)}, or a class of "
            "torch.optim.lr_scheduler, spelled exactly."
        )
    return construct(known[type_name], torch_optimizer(optimizer), read_numbers(params), "scheduler.params")


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself, or the one inside wrappers that keep it in `.optimizer`. Raises TypeError."""
    inner = optimizer
    while inner is not None and not isinstance(inner, torch.optim.Optimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(
            f"{type(optimizer).__name__} is not a torch.optim.Optimizer, and has none in .optimizer.\n"
            "  Give the schedule the optimizer whose learning rate it sets."
        )
    return inner


def _between(starts: Sequence[float], ends: Sequence[float], factor: float) -> list[float]:
    return [start + (end - start) * factor for start, end in zip(starts, ends, strict=True)]


def _count(name: str, value: Any, minimum: int = 1) -> int:
    is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
    if not is_whole or value < minimum:
        raise DeepSpeedError(f"{name} = {value!r} is not a whole number of steps >= {minimum}.")
    return int(value)


def _total(total_num_steps: Any, warmup_num_steps: int) -> int:
    total = _count("total_num_steps", total_num_steps)
    if total < warmup_num_steps:
        warn_once(
            f"total_num_steps = {total} is less than warmup_num_steps = {warmup_num_steps}: training ends before the warm-up does."
        )
    return total


def _warmup_type(kind: str) -> str:
    if kind in ("log", "linear"):
        return kind
    warn_once(f'warmup_type = {kind!r} is not "log" or "linear"; "log" is used.')
    return "log"


# Command-line arguments. --------------------------------------------------------------------------------------------


def _flag(text: str) -> bool:
    """A boolean as users write it on a command line."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


_ARGUMENTS: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "lr_range_test_min_lr": (float, 0.001, "starting learning rate"),
    "lr_range_test_step_rate": (float, 1.0, "growth of the learning rate per interval"),
    "lr_range_test_step_size": (int, 1000, "steps per interval"),
    "lr_range_test_staircase": (_flag, False, "grow in stairs, true or false"),
    "cycle_min_lr": (float, 0.01, "learning rate at both ends of the cycle"),
    "cycle_max_lr": (float, 0.1, "learning rate at its top"),
    "decay_lr_rate": (float, 0.0, "decay of the learning rate after the cycle"),
    "cycle_first_step_size": (int, 1000, "steps of the rising half"),
    "cycle_second_step_size": (int, None, "steps of the falling half; default: as the rising one"),
    "cycle_first_stair_count": (int, 0, "stairs of the rising half"),
    "cycle_second_stair_count": (int, None, "stairs of the falling half; default: as the rising one"),
    "decay_step_size": (int, 1000, "steps per unit of decay after the cycle"),
    "cycle_momentum": (_flag, True, "cycle beta1 too, true or false"),
    "cycle_min_mom": (float, 0.8, "beta1 at the top of the cycle"),
    "cycle_max_mom": (float, 0.9, "beta1 at its ends"),
    "decay_mom_rate": (float, 0.0, "growth of beta1 after the cycle"),
    "warmup_min_lr": (float, 0.0, "learning rate before warm-up"),
    "warmup_max_lr": (float, 0.001, "learning rate after warm-up"),
    "warmup_num_steps": (int, 1000, "steps of warm-up"),
    "warmup_type": (str, "log", "log or linear"),
    "warmup_min_ratio": (float, 0.01, "part of the learning rate before warm-up (WarmupCosineLR)"),
    "cos_min_ratio": (float, 0.01, "part of the learning rate at the end (WarmupCosineLR)"),
    "total_num_steps": (int, None, "steps of the whole training (WarmupDecayLR, WarmupCosineLR)"),
}
"""Per argument: type, default, help. Its name is the constructor's, and some defaults differ from the constructor's."""

_ARGUMENTS_OF: dict[str, tuple[str, ...]] = {
    name: tuple(arg for arg in _ARGUMENTS if arg in inspect.signature(kind).parameters)
    for name, kind in _SCHEDULES.items()
}


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--lr_schedule` and the settings of every schedule; read them back with `get_config_from_args`."""
    group = parser.add_argument_group("Learning-rate schedule")
    group.add_argument("--lr_schedule", type=str, default=None, help=f"one of {', '.join(VALID_LR_SCHEDULES)}")
    for name, (kind, default, text) in _ARGUMENTS.items():
        group.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """(the configuration's `scheduler` section, None), or (None, why there is none)."""
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in _SCHEDULES:
        return None, f"{name} is not supported LR schedule. {did_you_mean(name, VALID_LR_SCHEDULES)}"
    given = {key: getattr(args, key, None) for key in _ARGUMENTS_OF[name]}
    return {"type": name, "params": {key: value for key, value in given.items() if value is not None}}, None


_TOP_LR = {"LRRangeTest": "lr_range_test_min_lr", "OneCycle": "cycle_max_lr"}
"""Which setting stands for a schedule's learning rate, where it is not warmup_max_lr."""


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """(the learning rate a `scheduler` section speaks of, ""), or (None, why there is none)."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    name = config["type"]
    if name not in _SCHEDULES:
        return None, f"{name} is not a valid LR schedule. {did_you_mean(name, VALID_LR_SCHEDULES)}"
    lr = config["params"].get(_TOP_LR.get(name, "warmup_max_lr"))
    return (lr, "") if lr is not None else (None, f"{name} is given no learning rate in config")
