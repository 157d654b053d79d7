"""Adagrad for parameters in main memory.

Built by `optim.build` where the optimizer state is offloaded (torch.optim.Adagrad otherwise), or by the user. The
arithmetic is `kernels.adagrad_`. State per tensor: `sum`, under torch.optim.Adagrad's key. After Duchi et al., JMLR 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed.optim import kernels
from deepspeed.optim.adam import check_on_cpu, state_dtype
from deepspeed.optim.traits import Needs, ShardableOptimizer, loss_of, with_gradients


class DeepSpeedCPUAdagrad(ShardableOptimizer):
    """Adagrad with L2 weight decay and fp32 sums unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Raises DeepSpeedError for a tensor not on the CPU."""
        loss = loss_of(closure)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params, grads = with_gradients(group)
        if not params:
            return
        sums = []
        for param in params:
            check_on_cpu(self, param.device)
            state = self.state[param]
            if not state:
                dtype = state_dtype(param) if self.fp32_optimizer_states else param.dtype
                state["sum"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            sums.append(state["sum"])
        kernels.adagrad_(params, grads, sums, lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
