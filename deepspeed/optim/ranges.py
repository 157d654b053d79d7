"""The ranges of optimizers' settings: one table for every class here and for the configuration.

Asked by `ShardableOptimizer` for each parameter group and by `optim.build` for `optimizer.params`, before anything is
built on the values. Pure. The ranges are those of torch.optim; NaN, infinity and text are refused as well.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepspeed.utils.errors import DeepSpeedError

_NOT_NEGATIVE = (
    "lr",
    "muon_lr",
    "adam_lr",
    "eps",
    "weight_decay",
    "momentum",
    "lr_decay",
    "initial_accumulator_value",
    "alpha",
    "lambd",
    "max_grad_norm",
    "min_coeff",
    "max_coeff",
    "factor_min",
    "factor_max",
    "factor_threshold",
)


def check_ranges(settings: Mapping[str, Any], where: str) -> None:
    """Raise DeepSpeedError for the first setting outside its range. `where` names the owner: "FusedAdam: ", "x.params."."""
    for key in _NOT_NEGATIVE:
        if key in settings and settings[key] is not None:
            _check_number(settings[key], f"{where}{key}")
    betas = settings.get("betas")
    if betas is not None:
        _check_betas(betas, f"{where}betas")
    if "coeff_beta" in settings:
        _check_fraction(settings["coeff_beta"], f"{where}coeff_beta")
    for least, most in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
        low, high = settings.get(least, 0), settings.get(most, math.inf)
        if low > high:
            raise DeepSpeedError(f"{where}{least} = {low!r} is above {most} = {high!r}.\n  Exchange them.")


def _check_number(value: Any, name: str) -> None:
    if _is_number(value) and value >= 0 and math.isfinite(value):
        return
    raise DeepSpeedError(f"{name} = {value!r} is not a finite number of at least 0.\n  Give one.")


def _check_betas(betas: Any, name: str) -> None:
    if not isinstance(betas, Sequence) or isinstance(betas, str):
        raise DeepSpeedError(f"{name} = {betas!r} is not a list of numbers.\n  Give numbers from 0 to below 1.")
    for place, beta in enumerate(betas):
        _check_fraction(beta, f"{name}[{place}]")


def _check_fraction(value: Any, name: str) -> None:
    if not (_is_number(value) and 0 <= value < 1):
        raise DeepSpeedError(f"{name} = {value!r} is not in [0, 1).\n  Give a number from 0 to below 1, such as 0.9.")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
