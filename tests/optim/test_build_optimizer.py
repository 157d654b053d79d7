from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepspeed.optim import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    DeepSpeedCPUSGD,
    FusedAdam,
    FusedLamb,
    FusedLion,
    MuonWithAuxAdam,
    build_optimizer,
)
from deepspeed.optim.onebit_adam import OnebitAdam
from deepspeed.optim.onebit_lamb import OnebitLamb
from deepspeed.optim.zero_one_adam import ZeroOneAdam
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, NotAvailableError
from tests.optim.steps import parameters


def build(name: str, offload: bool = False, **params: Any) -> torch.optim.Optimizer:
    return build_optimizer(name, params, [{"params": parameters()}], offload=offload)


@pytest.mark.parametrize(
    ("name", "device_class", "offload_class"),
    [
        ("Adam", FusedAdam, DeepSpeedCPUAdam),
        ("adam", FusedAdam, DeepSpeedCPUAdam),
        ("ADAMW", FusedAdam, DeepSpeedCPUAdam),
        ("Lamb", FusedLamb, FusedLamb),
        ("lion", FusedLion, DeepSpeedCPULion),
        ("Adagrad", torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        ("SGD", torch.optim.SGD, DeepSpeedCPUSGD),
        ("RMSprop", torch.optim.RMSprop, torch.optim.RMSprop),
    ],
)
def test_a_name_gives_its_class(name: str, device_class: type, offload_class: type) -> None:
    assert type(build(name, lr=0.1)) is device_class
    assert type(build(name, lr=0.1, offload=True)) is offload_class


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize(
    ("name", "params", "decoupled"),
    [("Adam", {}, True), ("Adam", {"adam_w_mode": False}, False), ("AdamW", {"adam_w_mode": False}, True)],
)
def test_adam_is_adamw_unless_told_otherwise(name: str, params: dict[str, Any], decoupled: bool, offload: bool) -> None:
    assert build(name, offload=offload, **params).adam_w_mode is decoupled  # type: ignore[attr-defined]


@pytest.mark.parametrize("offload", [True, False])
def test_torch_adam_is_torchs_own(offload: bool) -> None:
    assert type(build("Adam", offload, torch_adam=True, foreach=False)) is torch.optim.AdamW
    assert type(build("Adam", offload, torch_adam=True, adam_w_mode=False)) is torch.optim.Adam
    assert type(build("AdamW", offload, torch_adam=False)) is (DeepSpeedCPUAdam if offload else FusedAdam)


def test_offloaded_sgd_is_torchs_own_where_only_that_has_the_switch() -> None:
    assert type(build("SGD", offload=True, lr=0.1, maximize=True)) is torch.optim.SGD
    assert type(build("SGD", offload=True, lr=0.1, maximize=False, momentum=0.9)) is DeepSpeedCPUSGD
    with pytest.raises(DeepSpeedConfigError, match=r"optimizer.params.momentun = 0: DeepSpeedCPUSGD has no setting"):
        build("SGD", offload=True, momentun=0)


def test_settings_reach_the_constructor_also_as_json_writes_them() -> None:
    group = build("AdamW", lr="2e-5", betas=[0.8, "0.9"], eps=1, weight_decay=0.01).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-5, (0.8, 0.9), 1, 0.01)


def test_groups_keep_what_is_theirs() -> None:
    groups = [{"params": [parameter], "lr": 0.1 * i} for i, parameter in enumerate(parameters())]
    assert [g["lr"] for g in build_optimizer("Adam", {"lr": 9.0}, groups).param_groups] == [g["lr"] for g in groups]


def test_plain_parameters_are_one_group() -> None:
    assert len(build_optimizer("SGD", {"lr": 0.1}, iter(parameters())).param_groups) == 1


def test_a_setting_for_cpu_optimizers_warns_elsewhere(warnings: list[str]) -> None:
    build("Adam", offload=True, fp32_optimizer_states=False)
    assert warnings == []
    build("Adam", fp32_optimizer_states=False)
    assert warnings == [
        "optimizer.params.fp32_optimizer_states has no effect on FusedAdam: it concerns CPU optimizers only."
    ]


@pytest.mark.parametrize(
    ("name", "nearest"), [("AdmW", "'AdamW'"), ("sgd", "'SGD'"), ("rmsprop", "'RMSprop'"), ("Lambs", "'Lamb'")]
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(
        DeepSpeedConfigError, match=f"{name} is not a supported DeepSpeed Optimizer.\n  Did you mean .*{nearest}"
    ):
        build(name)


@pytest.mark.parametrize("name", ["Optimizer", "lr_scheduler", "nothing_like_it"])
def test_what_is_no_optimizer_is_an_assertion_error(name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name} is not a supported DeepSpeed Optimizer"):
        build(name)


@pytest.mark.parametrize(
    ("name", "kind", "key", "nearest"),
    [
        ("AdamW", "FusedAdam", "weight_dcay", "weight_decay"),
        ("SGD", "SGD", "Momentun", "momentum"),
        ("Muon", "Muon", "ns_metod", "ns_method"),
    ],
)
def test_a_wrong_setting_names_the_key_the_class_and_what_it_takes(
    name: str, kind: str, key: str, nearest: str
) -> None:
    with pytest.raises(
        DeepSpeedConfigError,
        match=f"optimizer.params.{key} = 0.1: {kind} has no setting '{key}'.\n  Did you mean '{nearest}'.*It takes .*lr",
    ):
        build(name, **{key: 0.1})


def test_a_value_the_class_refuses_is_shown_with_its_place() -> None:
    with pytest.raises(
        DeepSpeedConfigError,
        match=r"optimizer.params = \{'nesterov': True\}: SGD refuses it: Nesterov momentum requires",
    ):
        build("SGD", nesterov=True)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lamb", "Muon"])
def test_clipping_in_the_optimizer_is_refused_with_the_cure(name: str) -> None:
    with pytest.raises(ValueError, match=r'max_grad_norm = 1\.0.*\n.*set "gradient_clipping": 1\.0'):
        build(name, max_grad_norm=1.0)


def test_one_bit_optimizers_are_made_whatever_the_case_and_the_backend_they_name() -> None:
    made = build("onebitADAM", freeze_step=7, comm_backend_name="mpi")
    assert isinstance(made, OnebitAdam)
    assert made.freeze_step == 7
    assert isinstance(build("OneBitLamb", comm_backend_name="gloo"), OnebitLamb)
    assert isinstance(build("zerooneadam", local_step_clipper=8), ZeroOneAdam)


def test_an_interval_of_averages_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(DeepSpeedError, match=r"local_step_clipper = 12 is no power of two"):
        build("ZeroOneAdam", local_step_clipper=12)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "soon"])
def test_a_freeze_step_is_a_whole_number(value: Any) -> None:
    with pytest.raises(DeepSpeedError, match=r"freeze_step = .* is not a whole number of at least 1"):
        build("OneBitAdam", freeze_step=value)


def test_mu_optimizers_name_the_package_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mup", None)
    with pytest.raises(DeepSpeedConfigError, match=r'"MuAdam" comes from package mup.*\n  Install it: pip install mup'):
        build("muadam")


def test_mu_optimizers_are_made_by_that_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mup", SimpleNamespace(MuSGD=lambda params, **kw: torch.optim.SGD(params, **kw)))
    assert build("MuSGD", lr=0.3).param_groups[0]["lr"] == 0.3


def muon_groups() -> list[dict[str, Any]]:
    matrix, vector, other = parameters([(2, 3), (4,), (3, 3)])
    return [
        {"params": [matrix], "use_muon": True},
        {"params": [vector], "use_muon": False},
        {"params": [other], "use_muon": True, "lr": 0.5},
    ]


def test_each_half_of_muon_takes_its_own_settings_then_its_groups() -> None:
    params = {"lr": 0.1, "muon_lr": 0.2, "momentum": 0.8, "betas": [0.7, 0.8], "weight_decay": 0.3}
    optimizer = build_optimizer("Muon", params, muon_groups())
    assert type(optimizer) is MuonWithAuxAdam
    matrices, vectors, others = optimizer.param_groups
    assert (matrices["lr"], vectors["lr"], others["lr"]) == (0.2, 0.1, 0.5)
    assert (matrices["momentum"], matrices["weight_decay"], matrices["ns_method"]) == (0.8, 0.3, "gram")
    assert (vectors["betas"], vectors["weight_decay"]) == ((0.7, 0.8), 0.3)
    assert "betas" not in matrices
    assert "momentum" not in vectors


def test_muon_wants_tagged_groups() -> None:
    with pytest.raises(ValueError, match='groups that say "use_muon"'):
        build("Muon")


def test_per_head_muon_is_not_available_yet() -> None:
    with pytest.raises(NotAvailableError, match="per_head_muon = true is not available yet"):
        build_optimizer("Muon", {"per_head_muon": True}, muon_groups())
    assert build_optimizer("Muon", {"per_head_muon": False}, muon_groups())
