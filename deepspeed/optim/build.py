"""From `optimizer.type` and `optimizer.params` of the configuration to an optimizer.

Called by the engine. Names of the first table below are matched whatever their letter case; every other name is looked
up, spelled exactly, in torch.optim. What an optimizer needs beyond elements (norms of parameters, whole matrices) it says by `traits.py`.

Invariant: a setting either reaches the optimizer's constructor, or warns that it has no effect, or raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from deepspeed.optim.adagrad import DeepSpeedCPUAdagrad
from deepspeed.optim.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.optim.arguments import check_keys, construct, did_you_mean, read_numbers
from deepspeed.optim.lamb import FusedLamb
from deepspeed.optim.lion import DeepSpeedCPULion, FusedLion
from deepspeed.optim.muon import MuonWithAuxAdam
from deepspeed.optim.onebit_adam import OnebitAdam
from deepspeed.optim.onebit_lamb import OnebitLamb
from deepspeed.optim.ranges import check_ranges
from deepspeed.optim.sgd import DeepSpeedCPUSGD
from deepspeed.optim.zero_one_adam import ZeroOneAdam
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, NotAvailableError
from deepspeed.utils.logging import warn_once

WHERE = "optimizer.params"

Optimizer = torch.optim.Optimizer
Params = dict[str, Any]
Groups = list[Any]
Builder = Callable[[Params, Groups, bool], Optimizer]


def build_optimizer(
    type_name: str, params: Mapping[str, Any], param_groups: Iterable[Any], *, offload: bool = False
) -> Optimizer:
    """The optimizer named `type_name` over `param_groups` (group dicts, or parameters).

    `offload`: its state rests on the cpu or nvme tier. Muon wants groups with `use_muon` (`muon.split_for_muon`).
    Raises DeepSpeedConfigError for names, keys and values that do not exist.
    """
    settings = read_numbers(params)
    if (norm := settings.get("max_grad_norm", 0)) and norm > 0:
        raise DeepSpeedConfigError(
            f"{WHERE}.max_grad_norm = {norm}: the optimizer does not clip gradients, the engine does.\n"
            f'  Remove max_grad_norm and set "gradient_clipping": {norm} at the top of the configuration.'
        )
    _check_ranges(settings)
    builder = _BUILDERS.get(type_name.lower())
    if builder is None:
        builder = _sgd if type_name == "SGD" else _plain(_torch_class(type_name))
    return builder(settings, list(param_groups), offload)


def _check_ranges(settings: Params) -> None:
    try:
        check_ranges(settings, f"{WHERE}.")
    except DeepSpeedError as error:
        raise DeepSpeedConfigError(str(error)) from None


def _plain(device_class: type[Optimizer], offload_class: type[Optimizer] | None = None) -> Builder:
    """The builder of a class that takes `params` as they are; another class where the state is offloaded."""

    def build(params: Params, groups: Groups, offload: bool) -> Optimizer:
        if not (offload and offload_class):
            params = _without(params, "fp32_optimizer_states", device_class, "it concerns CPU optimizers only")
        return construct(offload_class if offload and offload_class else device_class, groups, params, WHERE)

    return build


def _adam(params: Params, groups: Groups, offload: bool, *, always_decoupled: bool) -> Optimizer:
    params = dict(params)
    decoupled = params.pop("adam_w_mode", True) or always_decoupled
    if params.pop("torch_adam", False):
        return _plain(torch.optim.AdamW if decoupled else torch.optim.Adam)(params, groups, offload)
    params["adamw_mode" if offload else "adam_w_mode"] = decoupled
    return _plain(FusedAdam, DeepSpeedCPUAdam)(params, groups, offload)


_TORCH_SGD_ONLY = ("maximize", "foreach", "differentiable", "fused")
"""Switches of torch.optim.SGD that choose what DeepSpeedCPUSGD is not."""


def _sgd(params: Params, groups: Groups, offload: bool) -> Optimizer:
    if not offload or any(params.get(switch) for switch in _TORCH_SGD_ONLY):
        return _plain(torch.optim.SGD)(params, groups, offload)
    params = {key: value for key, value in params.items() if key not in _TORCH_SGD_ONLY}
    return construct(DeepSpeedCPUSGD, groups, params, WHERE)


_MUON_HALVES = {
    True: ("muon_lr", ("lr", "momentum", "weight_decay", "ns_method")),
    False: ("adam_lr", ("lr", "betas", "eps", "weight_decay")),
}
"""Per value of `use_muon`: the setting that replaces `lr`, and the settings of that half."""


def _muon(params: Params, groups: Groups, offload: bool) -> Optimizer:
    accepted = {"per_head_muon", *(key for own_lr, keys in _MUON_HALVES.values() for key in (own_lr, *keys))}
    check_keys(params, accepted, "Muon", WHERE)
    if params.get("per_head_muon"):
        raise NotAvailableError(
            f"{WHERE}.per_head_muon = true is not available yet.\n"
            "  Remove it: each projection is then orthogonalised as one matrix."
        )
    return construct(MuonWithAuxAdam, [_muon_group(group, params) for group in groups], {}, WHERE)


def _muon_group(group: Any, params: Params) -> dict[str, Any]:
    """`group` with its half's settings: the shared ones, over them `muon_lr` or `adam_lr`, over them its own."""
    if not isinstance(group, dict) or "use_muon" not in group:
        raise DeepSpeedConfigError(
            'Muon wants parameter groups that say "use_muon": true (matrices of hidden layers) or false (the rest).\n'
            "  Give the key to every group in model_parameters, or pass groups made by split_for_muon."
        )
    own_lr, keys = _MUON_HALVES[bool(group["use_muon"])]
    shared = {key: params[key] for key in keys if key in params}
    special = {"lr": params[own_lr]} if own_lr in params else {}
    return {**shared, **special, **group}


def _mup(name: str, params: Params, groups: Groups, offload: bool) -> Optimizer:
    try:
        kind = getattr(importlib.import_module("mup"), name)
    except ImportError as error:
        raise DeepSpeedConfigError(
            f'optimizer.type = "{name}" comes from package mup, which cannot be imported ({error}).\n'
            "  Install it: pip install mup."
        ) from error
    return construct(kind, groups, params, WHERE)


_BUILDERS: dict[str, Builder] = {
    "adam": partial(_adam, always_decoupled=False),
    "adamw": partial(_adam, always_decoupled=True),
    "lamb": _plain(FusedLamb),
    "lion": _plain(FusedLion, DeepSpeedCPULion),
    "adagrad": _plain(torch.optim.Adagrad, DeepSpeedCPUAdagrad),
    "muon": _muon,
    **{name.lower(): partial(_mup, name) for name in ("MuAdam", "MuAdamW", "MuSGD")},
    "onebitadam": _plain(OnebitAdam),
    "zerooneadam": _plain(ZeroOneAdam),
    "onebitlamb": _plain(OnebitLamb),
}
_OUR_NAMES = ("Adam", "AdamW", "Lamb", "Lion", "Adagrad", "Muon")


def _torch_class(name: str) -> type[Optimizer]:
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    try:
        return classes[name]
    except KeyError:
        raise DeepSpeedConfigError(
            f"optimizer.type: {name} is not a supported DeepSpeed Optimizer.\n"
            f"  {did_you_mean(name, [*_OUR_NAMES, *classes])}Use one of {', '.join(_OUR_NAMES)}, or the exact name of "
            f"a class of torch.optim: {', '.join(sorted(classes))}."
        ) from None


def _without(params: Params, key: str, kind: type[Optimizer], reason: str) -> Params:
    """`params` without a key that has no effect here, after one warning."""
    if key not in params:
        return params
    warn_once(f"{WHERE}.{key} has no effect on {kind.__name__}: {reason}.")
    return {name: value for name, value in params.items() if name != key}
