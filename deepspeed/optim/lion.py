"""Lion: the sign of an interpolated momentum, on any device (`FusedLion`) or in main memory (`DeepSpeedCPULion`).

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. The arithmetic is `kernels.lion_`.
State per tensor: `step` and `exp_avg`. After arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed.optim import kernels
from deepspeed.optim.cpu import Batch, CpuOptimizer, complete_state, state_dtype
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
            params, grads = with_gradients(group)
            states = [complete_state(self.state[p], p, ("exp_avg",), state_dtype(p)) for p in params]
            if params:
                _lion_(Batch(group, params, grads, states))
        return loss


class DeepSpeedCPULion(CpuOptimizer):
    """Lion for parameters in main memory, with fp32 momentum unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE
    state_keys = ("exp_avg",)

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

    def _update(self, batch: Batch) -> None:
        _lion_(batch)


def _lion_(batch: Batch) -> None:
    group = batch.group
    kernels.count_steps_(batch.steps)
    kernels.lion_(
        batch.params, batch.grads, batch.column("exp_avg"), lows=batch.lows, grad_factor=batch.grad_factor,
        lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"],
    )  # fmt: skip
