"""Muon: momentum whose matrices are replaced by their nearest orthogonal ones; Adam for everything that is no matrix.

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. Needs WHOLE_MATRICES: momentum is element-wise
and stays in the shard; the update of a matrix cut over ranks is gathered, orthogonalised by each rank that holds a
piece of it, and each takes its piece.

    run of momentum --nesterov--> run of updates --gather--> matrices --Newton-Schulz--> matrices --own pieces--> run

Invariant: one `gather` per step, with the runs of all Muon groups, whatever runs this rank has.

After K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the Gram form iterates on
X X^T, which is smaller than X, and multiplies X in at the end. State: `momentum_buffer` in fp32; for the Adam half that
of `optim.adam`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed.optim.adam import adam_batches, adam_step_
from deepspeed.optim.cpu import state_dtype
from deepspeed.optim.traits import Needs, ShardableOptimizer, loss_of, with_gradients
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

MUON_DEFAULTS: Mapping[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram"}
ADAM_DEFAULTS: Mapping[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic a x + b x^3 + c x^5 of one Newton-Schulz step: steepest at 0 while [0, 1] stays near 1."""
_NUM_STEPS = 5
_GRAM_RESTART = 2
"""Steps after which the Gram form multiplies X in and starts anew: small singular values have grown out of the
rounding error of X X^T by then."""


class Muon(ShardableOptimizer):
    """Muon for parameters that are all matrices (2-D), stacks of matrices (3-D) or filters (4-D and more)."""

    needs = Needs.WHOLE_MATRICES

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_method: str = "gram",
    ) -> None:
        _check_method(ns_method)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_method": ns_method})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Collective where `sharding` is set."""
        loss = loss_of(closure)
        _muon_step_(self, self.param_groups)
        return loss


class MuonWithAuxAdam(ShardableOptimizer):
    """Muon for the groups with `use_muon` True, AdamW for those with False; see `split_for_muon`."""

    needs = Needs.WHOLE_MATRICES

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = []
        for i, group in enumerate(param_groups):
            if "use_muon" not in group:
                raise DeepSpeedError(
                    f'parameter group {i} has no "use_muon".\n'
                    "  Set it to True (matrices of hidden layers) or False in every group, or let split_for_muon do so."
                )
            groups.append({**(MUON_DEFAULTS if group["use_muon"] else ADAM_DEFAULTS), **group})
            _check_method(groups[-1].get("ns_method", "gram"))
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Collective where `sharding` is set."""
        loss = loss_of(closure)
        _muon_step_(self, [group for group in self.param_groups if group["use_muon"]])
        for group in self.param_groups:
            if not group["use_muon"]:
                for batch in adam_batches(self, group, fp32_states=True).values():
                    adam_step_(batch, {"bias_correction": True, **group}, decoupled=True)
        return loss


def split_for_muon(
    named_parameters: Iterable[tuple[str, Tensor]], param_groups: Iterable[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Groups in two halves, `use_muon` True for matrices of hidden layers and False for the rest; empty halves dropped.

    `param_groups` default to one of all trainable parameters; a group that has `use_muon` already stays as it is.
    Raises DeepSpeedConfigError for a parameter that is not among `named_parameters`.
    """
    named = list(named_parameters)
    names = {id(param): name for name, param in named}
    if param_groups is None:
        param_groups = [{"params": [param for _, param in named if param.requires_grad]}]
    split: list[dict[str, Any]] = []
    for group in param_groups:
        if "use_muon" in group:
            split.append(group)
            continue
        halves: dict[bool, list[Tensor]] = {True: [], False: []}
        for param in group["params"]:
            halves[_is_for_muon(_name_of(param, names), param)].append(param)
        split += [{**group, "params": half, "use_muon": flag} for flag, half in halves.items() if half]
    return split


def _name_of(param: Tensor, names: Mapping[int, str]) -> str:
    try:
        return names[id(param)]
    except KeyError:
        raise DeepSpeedConfigError(
            f"a parameter of shape {tuple(_full_shape(param))} in model_parameters is not a parameter of the model, so "
            'Muon cannot tell by its name which half it belongs to.\n  Take it from the model, or set "use_muon" in '
            "its group."
        ) from None


def _is_for_muon(name: str, param: Tensor) -> bool:
    return len(_full_shape(param)) >= 2 and not any(word in name.lower() for word in ("embed", "lm_head"))


def _full_shape(param: Tensor) -> torch.Size:
    return getattr(param, "ds_shape", param.shape)


def _muon_step_(optimizer: ShardableOptimizer, groups: Iterable[dict[str, Any]]) -> None:
    sharding = optimizer._sharding()
    runs: list[Tensor] = []
    updates: list[Tensor] = []
    settings: list[dict[str, Any]] = []
    for group in groups:
        params, grads = with_gradients(group)
        if params:
            runs += params
            updates += _nesterov(optimizer, params, grads, group["momentum"])
            settings += [group] * len(params)
    matrices = sharding.gather(runs, updates)
    for run, group in zip(runs, settings, strict=True):
        run.mul_(1 - group["lr"] * group["weight_decay"])
        for piece in sharding.pieces(run):
            full = orthogonal_update(matrices[piece.index].view(piece.shape), group["ns_method"])
            own = piece.of_run(run)
            own.add_(piece.of_param(full).view(own.shape), alpha=-group["lr"])


def _nesterov(
    optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor], momentum: float
) -> list[Tensor]:
    """Advance the momentum, m = lerp(m, g, 1 - momentum), and look ahead: lerp(g, m, momentum)."""
    buffers = []
    for param in params:
        state = optimizer.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=state_dtype(param))
        buffers.append(state["momentum_buffer"])
    wide = [grad.to(buffer.dtype) for grad, buffer in zip(grads, buffers, strict=True)]
    torch._foreach_lerp_(buffers, wide, 1 - momentum)
    return list(torch._foreach_lerp(wide, buffers, momentum))


def orthogonal_update(update: Tensor, ns_method: str) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly, times sqrt(max(1, rows / columns)); shape and dtype of `update`.

    [rows, cols] as it is; [n, rows, cols] as n matrices; more dims (filters) as [first, all others].
    """
    if update.dim() < 2:
        raise DeepSpeedError(
            f"Muon got a parameter of shape {tuple(update.shape)}: it updates matrices.\n"
            '  Put vectors and scalars into a group with "use_muon": False (MuonWithAuxAdam).'
        )
    matrix = update.flatten(1) if update.dim() > 3 else update
    rows, cols = matrix.shape[-2:]
    wide = matrix.mT if rows > cols else matrix
    dtype = _iteration_dtype(matrix.device, ns_method)
    x = (wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    x = _gram_iteration(x) if ns_method == "gram" and rows != cols else _plain_iteration(x)
    x = x.mT if rows > cols else x
    return (x.to(update.dtype) * max(1.0, rows / cols) ** 0.5).reshape(update.shape)


def _iteration_dtype(device: torch.device, ns_method: str) -> torch.dtype:
    """fp32 on CPUs, which mostly have no units for less; else fp16 for "gram", whose sums need its mantissa, or bf16."""
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if ns_method == "gram" else torch.bfloat16


def _plain_iteration(x: Tensor) -> Tensor:
    """X = a X + (b A + c A^2) X with A = X X^T, five times; x [..., rows, cols] with rows <= cols."""
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _gram_iteration(x: Tensor) -> Tensor:
    """The same polynomial through X X^T alone: Q = P Q and G = P G P with P = a I + b G + c G^2; X = Q X at the end."""
    a, b, c = _COEFFICIENTS
    for start, stop in ((0, _GRAM_RESTART), (_GRAM_RESTART, _NUM_STEPS)):
        gram = x @ x.mT
        product: Tensor | None = None
        for i in range(start, stop):
            factor = b * gram + c * gram @ gram
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            if i + 1 < stop:
                gram = factor @ gram @ factor
        assert product is not None, "every stretch has a step"
        x = product @ x
    return x


def _check_method(ns_method: str) -> None:
    if ns_method not in ("gram", "standard"):
        raise DeepSpeedError(f'ns_method = {ns_method!r} is not a Newton-Schulz method. Use "gram" or "standard".')
