"""0/1 Adam: Adam whose variance is updated ever more rarely, then local steps with a compressed average now and then.

Built by `optim.build` ("ZeroOneAdam") or by the user (`deepspeed.runtime.fp16.onebit.zoadam`); stepped by ZeRO 0 (and 1, which then shards nothing), or alone.

    steps 1 .. var_freeze_step     t a multiple of k_v: m and v from the mean of the gradients, in full precision
                                   else: m from their compressed mean
    after                          m from the rank's own gradients, p and a buffer move by -lr u;
                                   t a multiple of k_l: p moves back, the buffer's compressed mean is where it goes instead,
                                   and what it says of m

k_v doubles after every `var_update_scaler` updates of v; k_l after every `local_step_scaler` steps, up to
`local_step_clipper`. Which steps are which follows from the step count alone (`Plan`), so that all ranks agree.

Invariant: at a multiple of k_l every rank has the same p, m and v. In between p, m and the buffer are each rank's own, and are
saved as such; without them (another number of ranks) the run goes on from one value of each weight for all.

After arXiv:2202.06009, algorithm 1. States and flags have the original's names; without bias correction, as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

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
from deepspeed.optim.traits import OwnReduction, Whole, loss_of
from deepspeed.utils.errors import DeepSpeedError


class Plan:
    """Which step does what, from the settings alone. Steps are counted from 1."""

    def __init__(self, var_freeze_step: int, var_update_scaler: int, local_step_scaler: int, local_step_clipper: int):
        self.var_freeze_step = var_freeze_step
        self._scaler, self._local_scaler, self._clipper = var_update_scaler, local_step_scaler, local_step_clipper
        self._restart()

    def _restart(self) -> None:
        self._at, self._interval, self._counter = 1, 1, 0
        """The interval k_v in step `_at`, and the updates with it before that step."""

    def is_frozen(self, step: int) -> bool:
        """Whether the variance stays in this step."""
        return step > self.var_freeze_step

    def updates_variance(self, step: int) -> bool:
        """Whether a step before the freeze averages gradients in full precision."""
        if step < self._at:
            self._restart()
        while self._at < step:
            if self._at % self._interval == 0:
                self._counter += 1
                if self._counter == self._scaler:
                    self._counter, self._interval = 0, 2 * self._interval
            self._at += 1
        return step % self._interval == 0

    def averages(self, step: int) -> bool:
        """Whether a step after the freeze ends with an average."""
        doublings = (step - self.var_freeze_step - 1) // self._local_scaler
        interval = min(self._clipper, 2 ** min(doublings, 62))
        return step % interval == 0


class ZeroOneAdam(CompressedOptimizer):
    """0/1 Adam. A parameter group may have `exp_avg_mask`, as with `OnebitAdam`."""

    private_states = ("worker_error", "server_error", "comm_buffer", "base")
    needs_whole_states = True

    def __init__(
        self,
        params: Iterable[Any],
        deepspeed: Any = None,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        var_freeze_step: int = 100000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        self.var_freeze_step = check_count("var_freeze_step", var_freeze_step, 1)
        self.var_update_scaler = check_count("var_update_scaler", var_update_scaler, 1)
        self.local_step_scaler = check_count("local_step_scaler", local_step_scaler, 1)
        self.local_step_clipper = check_count("local_step_clipper", local_step_clipper, 1)
        if self.local_step_clipper & (self.local_step_clipper - 1):
            raise DeepSpeedError(
                f"local_step_clipper = {local_step_clipper} is no power of two: the interval between averages doubles up to it, and "
                "averages would not fall on its multiples.\n  Give 1, 2, 4, 8, 16, ..."
            )
        self.eps_inside_sqrt = eps_inside_sqrt
        self._plan = Plan(self.var_freeze_step, self.var_update_scaler, self.local_step_scaler, self.local_step_clipper)
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
        self._warn_unsettled("var_freeze_step", self.var_freeze_step)

    def nbytes_beside(self, num_ranks: int, is_sharded: bool) -> float:
        """See AveragesItself. And what local steps start from, and their sum."""
        return super().nbytes_beside(num_ranks, is_sharded) + 8

    @property
    def freeze_key(self) -> bool:
        """Whether the variance is frozen and steps are local from the next step on."""
        return self._plan.is_frozen(self._own().num_steps + 1)

    @property
    def takes_local(self) -> bool:
        """See AveragesItself."""
        step = self._own().num_steps + 1
        return self._plan.is_frozen(step) or not self._plan.updates_variance(step)

    @property
    def has_diverged(self) -> bool:
        """See AveragesItself."""
        step = self._own().num_steps
        return self._plan.is_frozen(step) and not self._plan.averages(step)

    @property
    def agreed_settings(self) -> dict[str, Any]:
        """See AveragesItself."""
        names = ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper", "eps_inside_sqrt")
        return {**super().agreed_settings, **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def step(self, closure: Closure | None = None, grads: object = None) -> Any:
        """One update. Collective where `takes_local`, but for local steps. `grads` is there for its place in the signature."""
        loss = loss_of(closure)
        own = self._own()
        wholes, step = own.parameters(), own.num_steps + 1
        if self._plan.is_frozen(step):
            self._local_step(own, wholes, step)
        else:
            self._step(own, wholes, step)
        own.end_step(wholes)
        return loss

    def _step(self, own: OwnReduction, wholes: Sequence[Whole], step: int) -> None:
        updates_variance = self._plan.updates_variance(step)
        if updates_variance:
            gradients = [gradient_in(whole.spans[0].run).reshape(-1) for whole in wholes]
        else:
            gradients = [whole.read() for whole in wholes]
            own.average_signs(gradients, [whole.state for whole in wholes])
            for whole, gradient in zip(wholes, gradients, strict=True):
                mask_(gradient, whole)
        for whole, gradient in zip(wholes, gradients, strict=True):
            moment, square = self._moments(own, whole)
            advance_([moment], [gradient], whole.group["betas"][0])
            if updates_variance:
                advance_squares_([square], [gradient], whole.group["betas"][1])
            self._move(whole, own)

    def _moments(self, own: OwnReduction, whole: Whole) -> tuple[torch.Tensor, torch.Tensor]:
        return own.momentum(whole), state_of(whole.state, "exp_avg_sq", whole.spans[0].run).view(-1)

    def _move(self, whole: Whole, own: OwnReduction) -> torch.Tensor:
        """p -= lr * u; u."""
        moment, square = self._moments(own, whole)
        group, param = whole.group, whole.spans[0].run.data.view(-1)
        update = moment / self._denominator(whole, square)
        if group["weight_decay"]:
            update.add_(param, alpha=group["weight_decay"])
        param.add_(update, alpha=-group["lr"])
        return update

    def _denominator(self, whole: Whole, square: torch.Tensor) -> torch.Tensor:
        return denominators([square], whole.group["eps"], self.eps_inside_sqrt)[0]

    def _local_step(self, own: OwnReduction, wholes: Sequence[Whole], step: int) -> None:
        buffers = []
        late = self._with_late_variance(own, wholes, step)
        for whole in wholes:
            if step == self.var_freeze_step + 1:  # what the errors are of is another quantity from now on
                for key in ("worker_error", "server_error"):
                    whole.state.pop(key, None)
            moment, _ = self._moments(own, whole)
            gradient = late[id(whole.state)] if id(whole.state) in late else whole.read()
            advance_([moment], [gradient], whole.group["betas"][0])
            if "base" not in whole.state:
                whole.state["base"] = whole.spans[0].run.detach().clone()
            update = self._move(whole, own)
            buffer = state_of(whole.state, "comm_buffer", whole.spans[0].run).view(-1)
            buffer.add_(update, alpha=-whole.group["lr"])
            whole.state["lrs"] = whole.state.get("lrs", 0.0) + whole.group["lr"]
            buffers.append(buffer)
        if self._plan.averages(step):
            self._average(own, wholes, buffers)

    def _with_late_variance(self, own: OwnReduction, wholes: Sequence[Whole], step: int) -> dict[int, torch.Tensor]:
        """The mean gradients of parameters that have joined since the freeze, whose variance still has to settle."""
        late = [whole for whole in wholes if int(whole.state.get("step", 0)) < min(self.var_freeze_step, step - 1)]
        gradients = [whole.read() for whole in late]
        own.average(gradients)
        for whole, gradient in zip(late, gradients, strict=True):
            advance_squares_([self._moments(own, whole)[1]], [gradient], whole.group["betas"][1])
        return {id(whole.state): gradient for whole, gradient in zip(late, gradients, strict=True)}

    def _average(self, own: OwnReduction, wholes: Sequence[Whole], buffers: Sequence[torch.Tensor]) -> None:
        """Replace the local steps since the last average by their compressed mean."""
        scales = [self._denominator(whole, self._moments(own, whole)[1]) for whole in wholes]
        for whole, buffer, scale in zip(wholes, buffers, scales, strict=True):
            whole.spans[0].run.data.copy_(
                whole.state.pop("base")
            )  # p - buffer would leave roundings of each rank's own
            buffer.mul_(scale)
        own.average_signs(buffers, [whole.state for whole in wholes])
        for whole, buffer, scale in zip(wholes, buffers, scales, strict=True):
            mask_(buffer, whole)
            lrs = whole.state["lrs"]
            if lrs:
                own.momentum(whole).copy_(buffer).div_(-lrs)
            whole.spans[0].run.data.view(-1).add_(buffer.div_(scale))
            buffer.zero_()
            whole.state["lrs"] = 0.0
