"""SGD with momentum for parameters in main memory.

Built by `optim.build` where the optimizer state is offloaded (torch.optim.SGD otherwise), or by the user. The
arithmetic is `kernels.sgd_`. State per tensor: `step`, and where its group has momentum `momentum_buffer`, under
torch.optim.SGD's key.

Invariant: a step equals torch.optim.SGD's within rounding; the first gradient enters the momentum undampened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepspeed.optim import kernels
from deepspeed.optim.cpu import Batch, CpuOptimizer
from deepspeed.optim.traits import Needs
from deepspeed.utils.errors import DeepSpeedError


class DeepSpeedCPUSGD(CpuOptimizer):
    """torch.optim.SGD in one pass over memory, with fp32 momentum unless `fp32_optimizer_states` is False."""

    needs = Needs.ELEMENTWISE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        self.fp32_optimizer_states = fp32_optimizer_states
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises DeepSpeedError for Nesterov's form without momentum or with dampening."""
        settings = {**self.defaults, **param_group}
        if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
            raise DeepSpeedError(
                f"nesterov = True with momentum {settings['momentum']} and dampening {settings['dampening']}: Nesterov's "
                "form needs momentum, and no dampening.\n  Set momentum above 0 and dampening to 0, or leave nesterov out."
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer; state of torch.optim.SGD, which counts no steps, has taken some."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.setdefault("step", torch.ones(()))

    def state_keys_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """A momentum where the group has one."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, batch: Batch) -> None:
        group, steps = batch.group, batch.steps
        weights = [1.0 - group["dampening"] * (step.item() > 0) for step in steps]
        kernels.count_steps_(steps)
        kernels.sgd_(
            batch.params, batch.grads, batch.column("momentum_buffer") if group["momentum"] else None,
            lr=group["lr"], weight_decay=group["weight_decay"], momentum=group["momentum"], nesterov=group["nesterov"],
            weights=weights, lows=batch.lows, grad_factor=batch.grad_factor,
        )  # fmt: skip
