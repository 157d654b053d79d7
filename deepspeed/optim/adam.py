"""Adam and AdamW: on any device (`FusedAdam`), and for shards that rest in main memory (`DeepSpeedCPUAdam`).

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. The arithmetic is `kernels.adam_`.

State per tensor, under torch.optim.AdamW's own keys so that a checkpoint of one loads into the other: `step` (0-dim
fp32), `exp_avg`, `exp_avg_sq`.

Invariant: a step of either class equals torch.optim.AdamW (or Adam) with the same settings, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.optim import kernels
from deepspeed.optim.cpu import Batch, CpuOptimizer, State, complete_state, state_dtype
from deepspeed.optim.traits import Needs, ShardableOptimizer, loss_of, with_gradients
from deepspeed.utils.errors import DeepSpeedError


class AdamBatch(NamedTuple):
    """Tensors one kernel call may take together; the fields are its leading arguments."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def add(self, param: Tensor, grad: Tensor, state: State) -> None:
        """One more tensor."""
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.steps.append(state["step"])


ADAM_STATE = ("exp_avg", "exp_avg_sq")

Batches = dict[tuple[torch.device, torch.dtype], AdamBatch]


def adam_batches(optimizer: torch.optim.Optimizer, group: dict[str, Any], *, fp32_states: bool) -> Batches:
    """A group's tensors that have a gradient with their Adam state, made here at first, by device and dtype."""
    batches: Batches = {}
    for param, grad in zip(*with_gradients(group), strict=True):
        dtype = state_dtype(param) if fp32_states else param.dtype
        state = complete_state(optimizer.state[param], param, ADAM_STATE, dtype)
        key = (param.device, param.dtype)
        batch = batches.get(key)
        if batch is None:
            batch = batches[key] = AdamBatch([], [], [], [], [])
        batch.add(param, grad, state)
    return batches


class FusedAdam(ShardableOptimizer):
    """AdamW (`adam_w_mode`) or Adam with L2 weight decay, through torch's fused kernels.

    Moments have the parameter's dtype. `set_grad_none` is what `zero_grad` does when it is not told.
    """

    needs = Needs.ELEMENTWISE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = set_grad_none
        super().__init__(params, _defaults(lr, bias_correction, betas, eps, weight_decay, amsgrad))

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, or zero them where `set_to_none` (default: the constructor's choice) is False."""
        super().zero_grad(set_to_none=self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: object = None,
        output_params: object = None,
        scale: object = None,
        grad_norms: object = None,
        grad_scaler: object = None,
    ) -> Any:
        """One update of every tensor that has a gradient.

        The arguments after `closure` are those of an old interface; any of them raises RuntimeError.
        """
        if not (grads is output_params is scale is grad_norms is grad_scaler is None):
            raise RuntimeError(
                "FusedAdam.step takes only a closure: grads, output_params, scale, grad_norms and grad_scaler belong to "
                "an old interface.\n  Unscale the gradients first and leave them in param.grad."
            )
        loss = loss_of(closure)
        for group in self.param_groups:
            for batch in adam_batches(self, group, fp32_states=False).values():
                adam_step_(batch, group, decoupled=self.adam_w_mode)
        return loss


class DeepSpeedCPUAdam(CpuOptimizer):
    """`FusedAdam` for parameters in main memory, with fp32 moments unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE
    state_keys = ADAM_STATE

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        self.adam_w_mode = adamw_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params, _defaults(lr, bias_correction, betas, eps, weight_decay, amsgrad))

    def _update(self, batch: Batch) -> None:
        steps = batch.steps
        kernels.count_steps_(steps)
        kernels.adam_(
            batch.params, batch.grads, batch.column("exp_avg"), batch.column("exp_avg_sq"), steps, lows=batch.lows,
            decoupled=self.adam_w_mode, grad_factor=batch.grad_factor, **adam_settings(batch.group),
        )  # fmt: skip

    @torch.no_grad()
    def rollback_subgroup(self, subgroup_id: int) -> None:
        """Undo, within rounding, the last step of the tensor at this position; its gradient must still be there."""
        group, param = self._subgroup(subgroup_id)
        state = self.state.get(param, {})
        if not state or param.grad is None or not state["step"].item():
            raise DeepSpeedError(
                f"rollback_subgroup({subgroup_id}): there is no step to undo.\n"
                "  Call it after step_subgroup or step, before the gradient is cleared."
            )
        kernels.undo_adam_(
            param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
            decoupled=self.adam_w_mode, **adam_settings(group),
        )  # fmt: skip


def adam_step_(batch: AdamBatch, group: dict[str, Any], *, decoupled: bool) -> None:
    """Count and take one step of a batch with its group's settings."""
    kernels.count_steps_(batch.steps)
    kernels.adam_(*batch, decoupled=decoupled, **adam_settings(group))


def adam_settings(group: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `kernels.adam_` that a group holds; what it has of other optimizers stays behind."""
    return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "bias_correction")}


def _defaults(
    lr: float, bias_correction: bool, betas: tuple[float, float], eps: float, weight_decay: float, amsgrad: bool
) -> dict[str, Any]:
    return {
        "lr": lr,
        "bias_correction": bias_correction,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
    }
