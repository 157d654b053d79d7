"""Lion: the sign of an interpolated momentum, on any device (`FusedLion`) or in main memory (`DeepSpeedCPULion`).

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. The arithmetic is `kernels.lion_`.
State per tensor: `exp_avg`. After arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepspeed.optim import kernels
from deepspeed.optim.adam import check_on_cpu, state_dtype
from deepspeed.optim.traits import Needs, ShardableOptimizer, loss_of, with_gradients


class FusedLion(ShardableOptimizer):
    """Lion with fp32 momentum. `set_grad_none` is what `zero_grad` does when it is not told."""

    needs = Needs.ELEMENTWISE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        self.set_grad_none = set_grad_none
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients, or zero them where `set_to_none` (default: the constructor's choice) is False."""
        super().zero_grad(set_to_none=self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            _lion_step_(self, group, *with_gradients(group), fp32_states=True)
        return loss


class DeepSpeedCPULion(ShardableOptimizer):
    """Lion for parameters in main memory, with fp32 momentum unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        """`adamw_mode` has no effect: Accelerate passes it to every CPU optimizer."""
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Raises DeepSpeedError for a tensor not on the CPU."""
        loss = loss_of(closure)
        for group in self.param_groups:
            params, grads = with_gradients(group)
            for param in params:
                check_on_cpu(self, param.device)
            _lion_step_(self, group, params, grads, fp32_states=self.fp32_optimizer_states)
        return loss


def _lion_step_(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    *,
    fp32_states: bool,
) -> None:
    if not params:
        return
    exp_avgs = []
    for param in params:
        state = optimizer.state[param]
        if not state:
            dtype = state_dtype(param) if fp32_states else param.dtype
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        exp_avgs.append(state["exp_avg"])
    kernels.lion_(params, grads, exp_avgs, lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"])
