"""Settings outside their range, in the configuration and by class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deepspeed.optim import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLamb,
    FusedLion,
)
from deepspeed.optim.build import build_optimizer
from deepspeed.optim.muon import Muon, MuonWithAuxAdam
from deepspeed.optim.onebit_lamb import OnebitLamb
from deepspeed.optim.sgd import DeepSpeedCPUSGD
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

ADAMS = (FusedAdam, DeepSpeedCPUAdam, FusedLamb)
CLASSES = (*ADAMS, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad, DeepSpeedCPUSGD, Muon)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1"])
def test_every_class_refuses_a_setting_that_is_no_number_of_at_least_0(kind: Any, key: str, value: Any) -> None:
    with pytest.raises(DeepSpeedError, match=rf"{kind.__name__}: {key} = .* is not a finite number of at least 0"):
        kind([parameter()], **{key: value})


@pytest.mark.parametrize("kind", [*ADAMS, FusedLion, DeepSpeedCPULion])
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.5), (-0.1, 0.9), (0.9, float("nan")), ("0.9", 0.9), 0.9])
def test_every_class_refuses_betas_outside_0_to_1(kind: Any, betas: Any) -> None:
    with pytest.raises(DeepSpeedError, match=rf"{kind.__name__}: betas"):
        kind([parameter()], betas=betas)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FusedAdam, {"eps": -1e-8}),
        (DeepSpeedCPUAdam, {"eps": float("nan")}),
        (DeepSpeedCPUAdagrad, {"eps": -1.0}),
        (DeepSpeedCPUSGD, {"momentum": -0.9}),
        (Muon, {"momentum": -0.9}),
        (FusedLamb, {"min_coeff": -1}),
        (FusedLamb, {"min_coeff": 2, "max_coeff": 1}),
        (OnebitLamb, {"factor_min": 5}),
        (OnebitLamb, {"factor_threshold": -0.1}),
        (OnebitLamb, {"coeff_beta": 1.5}),
    ],
)
def test_the_settings_that_some_classes_have_are_checked_too(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(DeepSpeedError, match=rf"{kind.__name__}: {next(iter(settings))}"):
        kind([parameter()], **settings)


def test_a_group_of_its_own_settings_is_checked() -> None:
    with pytest.raises(DeepSpeedError, match="FusedAdam: lr = -1"):
        FusedAdam([{"params": [parameter()], "lr": -1}])
    with pytest.raises(DeepSpeedError, match="MuonWithAuxAdam: betas"):
        MuonWithAuxAdam([{"params": [parameter()], "use_muon": False, "betas": (2, 0)}])
    with pytest.raises(DeepSpeedError, match="FusedAdam: weight_decay"):
        FusedAdam([parameter()]).add_param_group({"params": [parameter()], "weight_decay": -1})


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lamb", "Lion", "SGD", "RMSprop", "Adagrad", "NAdam", "Muon"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("key", "value"), [("lr", -1), ("weight_decay", -0.1), ("lr", "nan"), ("lr", "fast")])
def test_the_configuration_is_refused_by_the_keys_full_name(name: str, offload: bool, key: str, value: Any) -> None:
    with pytest.raises(DeepSpeedConfigError, match=rf"^optimizer\.params\.{key} = "):
        build_optimizer(name, {key: value}, [parameter()], offload=offload)


def test_the_configurations_betas_are_refused_too() -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"^optimizer\.params\.betas\[1\] = 1\.0 is not in \[0, 1\)"):
        build_optimizer("AdamW", {"betas": [0.9, "1.0"]}, [parameter()])


def test_a_learning_rate_of_0_and_one_in_a_tensor_are_numbers() -> None:
    FusedAdam([parameter()], lr=0.0, betas=[0, 0.0], weight_decay=0)  # type: ignore[arg-type]
    FusedAdam([parameter()], lr=torch.tensor(0.1))  # type: ignore[arg-type]
