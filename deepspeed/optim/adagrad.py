"""Adagrad for parameters in main memory.

Built by `optim.build` where the optimizer state is offloaded (torch.optim.Adagrad otherwise), or by the user. The
arithmetic is `kernels.adagrad_`. State per tensor: `step` and `sum`, under torch.optim.Adagrad's keys. After Duchi et al., JMLR 12.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed.optim import kernels
from deepspeed.optim.cpu import Batch, CpuOptimizer
from deepspeed.optim.traits import Needs


class DeepSpeedCPUAdagrad(CpuOptimizer):
    """Adagrad with L2 weight decay and fp32 sums unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE
    state_keys = ("sum",)

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        """`adamw_mode` has no effect: Accelerate passes it to every CPU optimizer."""
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad})

    def _update(self, batch: Batch) -> None:
        group = batch.group
        kernels.count_steps_(batch.steps)
        kernels.adagrad_(
            batch.params, batch.grads, batch.column("sum"), lows=batch.lows, grad_factor=batch.grad_factor,
            lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip
