"""1-bit Adam: Adam until the variance has settled, then momentum averaged between ranks in one bit per element.

Built by `optim.build` ("OneBitAdam") or by the user (`deepspeed.runtime.fp16.onebit.adam`); stepped by ZeRO 0 and 1, or alone.

    steps 1 .. freeze_step   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2          g: mean over ranks
    after                    m = compressed mean of b1 m + (1 - b1) g;  v stays       g: each rank's own
    both                     p -= lr * (m / (sqrt(v) + eps) + weight_decay * p)

There is no bias correction, as in the paper's algorithm and in the original, which has the switch without using it. A
parameter that joins later warms up by itself: until it has had `freeze_step` steps its gradient is averaged in full.

Invariant: every rank has the same m, v and p after each step, bit for bit; what compression leaves out is in
`worker_error` and `server_error`, which are each rank's own and are saved with it.

After arXiv:2102.02888, algorithm 1. States and flags have the original's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.optim.compressed import (
    Closure,
    CompressedOptimizer,
    advance_,
    advance_squares_,
    check_count,
    denominators,
    gradient_in,
    mask_,
    state_of,
)
from deepspeed.optim.traits import OwnReduction, RunSpan, Whole, loss_of
from deepspeed.utils.logging import log_dist


class OnebitAdam(CompressedOptimizer):
    """Adam without bias correction, compressed after `freeze_step` steps.

    A parameter group may have `exp_avg_mask` (a tensor that multiplies the averaged momentum; the user's own is kept when a
    checkpoint is loaded) and `non_freeze` (true: plain Adam on averaged gradients for ever).
    """

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        freeze_step: int = 100000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        self.freeze_step = check_count("freeze_step", freeze_step, 1)
        self.eps_inside_sqrt = eps_inside_sqrt
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, cuda_aware=cuda_aware, backend=comm_backend_name)
        self._warn_unsettled("freeze_step", self.freeze_step)

    @property
    def takes_local(self) -> bool:
        """See AveragesItself."""
        return self._own().num_steps >= self.freeze_step

    @property
    def adam_freeze_key(self) -> bool:
        """Whether the variance is frozen and momentum is compressed from the next step on."""
        return self.takes_local

    @property
    def agreed_settings(self) -> dict[str, Any]:
        """See AveragesItself."""
        return {**super().agreed_settings, "freeze_step": self.freeze_step, "eps_inside_sqrt": self.eps_inside_sqrt}

    @torch.no_grad()
    def step(self, closure: Closure | None = None, grads: object = None) -> Any:
        """One update. Collective once `takes_local`. `grads` is there for its place in the signature."""
        loss = loss_of(closure)
        own = self._own()
        wholes = own.parameters()
        if self.takes_local:
            self._step_compressed(own, wholes)
        else:
            for group, members in by_group(wholes):
                self._warm_up(group, [span for whole in members for span in whole.spans])
            own.end_step(wholes)
            if self.takes_local:
                log_dist(f"OnebitAdam: {self.freeze_step} steps done, momentum is compressed from now on.", [0])
        return loss

    def _warm_up(self, group: dict[str, Any], spans: Sequence[RunSpan]) -> None:
        """Adam on averaged gradients, which the runs have."""
        beta1, beta2 = group["betas"]
        grads = [span.of_run(gradient_in(span.run)) for span in spans]
        moments = [span.of_run(state_of(self.state[span.run], "exp_avg", span.run)) for span in spans]
        squares = [span.of_run(state_of(self.state[span.run], "exp_avg_sq", span.run)) for span in spans]
        advance_(moments, grads, beta1)
        advance_squares_(squares, grads, beta2)
        self._apply(group, spans, moments, squares)

    def _step_compressed(self, own: OwnReduction, wholes: Sequence[Whole]) -> None:
        gradients = [whole.read() for whole in wholes]
        warms = [self._warms_up(whole) for whole in wholes]
        own.average([grad for grad, is_warm in zip(gradients, warms, strict=True) if is_warm])
        moments = [own.momentum(whole) for whole in wholes]
        for group, members in by_group(wholes):
            chosen = [i for i, whole in enumerate(wholes) if any(whole is member for member in members)]
            advance_([moments[i] for i in chosen], [gradients[i] for i in chosen], group["betas"][0])
        coded = [i for i, is_warm in enumerate(warms) if not is_warm]
        own.average_signs([moments[i] for i in coded], [wholes[i].state for i in coded])
        for i in coded:
            mask_(moments[i], wholes[i])
        for whole, moment, grad, is_warm in zip(wholes, moments, gradients, warms, strict=True):
            squares = [span.of_run(state_of(self.state[span.run], "exp_avg_sq", span.run)) for span in whole.spans]
            if is_warm:
                advance_squares_(squares, [span.of_param(grad) for span in whole.spans], whole.group["betas"][1])
            self._apply(whole.group, whole.spans, [span.of_param(moment) for span in whole.spans], squares)
        own.end_step(wholes)

    def _warms_up(self, whole: Whole) -> bool:
        return bool(whole.group.get("non_freeze")) or int(whole.state.get("step", 0)) < self.freeze_step

    def _apply(
        self, group: dict[str, Any], spans: Sequence[RunSpan], moments: Sequence[Tensor], squares: Sequence[Tensor]
    ) -> None:
        """p -= lr * (m / (sqrt(v) + eps) + weight_decay * p), span by span."""
        if not spans:
            return
        params = [span.of_run(span.run.data) for span in spans]
        updates = denominators(squares, group["eps"], self.eps_inside_sqrt)
        updates = [torch.div(moment, update, out=update) for moment, update in zip(moments, updates, strict=True)]
        if group["weight_decay"]:
            torch._foreach_add_(updates, [p.to(u.dtype) for p, u in zip(params, updates, strict=True)],
                                alpha=group["weight_decay"])  # fmt: skip
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def by_group(wholes: Sequence[Whole]) -> list[tuple[dict[str, Any], list[Whole]]]:
    """The parameters of each parameter group."""
    found: dict[int, tuple[dict[str, Any], list[Whole]]] = {}
    for whole in wholes:
        found.setdefault(id(whole.group), (whole.group, []))[1].append(whole)
    return list(found.values())
