"""1-bit LAMB: LAMB until the variance has settled, then momentum in one bit per element, with trust ratios that follow.

Built by `optim.build` ("OneBitLamb") or by the user (`deepspeed.runtime.fp16.onebit.lamb`); stepped by ZeRO 0 and 1, or alone.

    steps 1 .. freeze_step   LAMB: p -= lr r u;  u = m / (sqrt(v) + eps) + weight_decay p;  r = |p| / |u|, clamped
                             c = coeff_beta c + (1 - coeff_beta) r, where r is not 1
    after                    m = compressed mean of b1 m + (1 - b1) g, all momenta as one buffer, each times
                             q = (mean of the momenta's rms at the freeze) / its own, so that one scale suits them all
                             g' = (m - b1 m_before) / (1 - b1);  v' = b2 v' + (1 - b2) g'^2, begun as v
                             f = max((sqrt(v) + eps) / (sqrt(v') + eps)), blended with 1 by weight decay's share of u,
                             clamped to [factor_min, factor_max] and to within factor_threshold of the f before
                             p -= lr c f u

Invariant: every rank has the same m and, of what it holds, the same v, v' and p after each step.

After arXiv:2104.06069, algorithm 1. States and flags have the original's names; without bias correction, as there.
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
from deepspeed.optim.ranges import check_ranges
from deepspeed.optim.traits import OwnReduction, RunSpan, Whole, loss_of
from deepspeed.utils.logging import log_dist, warn_once

SETTLED_BETA2 = 0.999
"""From here on factors say something of a layer; see `docs/compressed-communication.md` for what was measured."""


class OnebitLamb(CompressedOptimizer):
    """LAMB, compressed after `freeze_step` steps. A parameter group may have `exp_avg_mask`, as with `OnebitAdam`."""

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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
    ) -> None:
        self.freeze_step = check_count("freeze_step", freeze_step, 1)
        self.eps_inside_sqrt = eps_inside_sqrt
        own = {"coeff_beta": coeff_beta, "factor_min": factor_min, "factor_max": factor_max}
        check_ranges({**own, "factor_threshold": factor_threshold}, "OnebitLamb: ")
        self.coeff_beta = coeff_beta
        self.factor_max, self.factor_min, self.factor_threshold = factor_max, factor_min, factor_threshold
        self._coeffs: list[float] = []
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, cuda_aware=cuda_aware, backend=comm_backend_name)
        self._warn_noisy()

    def _warn_noisy(self) -> None:
        """Say once that factors will be noise: the largest ratio of any element, between variances of few gradients each. A
        variance that has not settled, which is what 1-bit Adam warns of, is made up for by trust ratios and factors."""
        beta2 = min(float(group["betas"][1]) for group in self.param_groups)
        if beta2 < SETTLED_BETA2 and self.factor_max > 1:
            warn_once(
                f"OnebitLamb: betas[1] = {beta2:g} remembers about {round(1 / (1 - beta2))} steps, so after freeze_step the quietest element of a "
                f"layer, not its gradients' size, decides the layer's factor, up to factor_max = {self.factor_max:g}: losses end 1 to 5 % higher.\n"
                "  Set betas[1] to 0.999, or factor_max and factor_min to 1."
            )

    def nbytes_beside(self, num_ranks: int, is_sharded: bool) -> float:
        """See AveragesItself. And a second variance, which goes on: of the run's elements."""
        return super().nbytes_beside(num_ranks, is_sharded) + 4 / (num_ranks if is_sharded else 1)

    @property
    def takes_local(self) -> bool:
        """See AveragesItself."""
        return self._own().num_steps >= self.freeze_step

    @property
    def lamb_freeze_key(self) -> bool:
        """Whether the variance is frozen and momentum is compressed from the next step on."""
        return self.takes_local

    @property
    def worker_errors(self) -> list[Tensor]:
        """The error of this rank's messages, of all momenta as one buffer; empty before the first."""
        return [value for key, value in self.common.items() if key == "worker_error"]

    @property
    def server_errors(self) -> list[Tensor]:
        """The error of this rank's slice of the answers; empty before the first."""
        return [value for key, value in self.common.items() if key == "server_error"]

    @property
    def agreed_settings(self) -> dict[str, Any]:
        """See AveragesItself."""
        names = ("freeze_step", "eps_inside_sqrt", "coeff_beta", "factor_max", "factor_min", "factor_threshold")
        return {**super().agreed_settings, **{name: getattr(self, name) for name in names}}

    def get_lamb_coeffs(self) -> list[float]:
        """What the last step multiplied each parameter's update by, besides the learning rate; a copy."""
        return list(self._coeffs)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, grads: object = None) -> Any:
        """One update. Collective once `takes_local`, and at ZeRO stage 1. `grads` is there for its place in the signature."""
        loss = loss_of(closure)
        own = self._own()
        wholes = own.parameters()
        if self.takes_local:
            self._step_compressed(own, wholes)
        else:
            self._warm_up(own, wholes)
        own.end_step(wholes)
        return loss

    def _warm_up(self, own: OwnReduction, wholes: Sequence[Whole]) -> None:
        updates = []
        for whole in wholes:
            betas, mine = whole.group["betas"], []
            for span in whole.spans:
                grad = span.of_run(gradient_in(span.run))
                moment, square = self._state(span, "exp_avg"), self._state(span, "exp_avg_sq")
                advance_([moment], [grad], betas[0])
                advance_squares_([square], [grad], betas[1])
                mine.append(self._with_decay(whole, span, moment / self._denominator(whole, square)))
            updates.append(mine)
        norms = self._norms(own, wholes, updates)
        self._coeffs = [_trust_ratio(whole.group, *pair) for whole, pair in zip(wholes, norms, strict=True)]
        for whole, coeff, mine in zip(wholes, self._coeffs, updates, strict=True):
            whole.state.setdefault("lamb_coeff_freeze", 0.0)
            whole.state.setdefault("last_factor", 1.0)
            if coeff != 1.0:
                before = whole.state["lamb_coeff_freeze"]
                whole.state["lamb_coeff_freeze"] = self.coeff_beta * before + (1 - self.coeff_beta) * coeff
            self._move(whole, mine, coeff)

    def _step_compressed(self, own: OwnReduction, wholes: Sequence[Whole]) -> None:
        moments = [own.momentum(whole) for whole in wholes]
        if any("scaling_coeff" not in whole.state for whole in wholes):
            self._begin(wholes, moments)
        for state in self.state.values():
            if "exp_avg_sq" in state and "exp_avg_sq_fresh" not in state:
                state["exp_avg_sq_fresh"] = state["exp_avg_sq"].clone()
        before = [moment.clone() for moment in moments]
        for whole, moment in zip(wholes, moments, strict=True):
            advance_([moment], [whole.read()], whole.group["betas"][0])
            moment.mul_(whole.state["scaling_coeff"])
        self._average(own, moments)
        raw, updates, factors = [], [], []
        for whole, moment, last in zip(wholes, moments, before, strict=True):
            moment.div_(whole.state["scaling_coeff"])
            mask_(moment, whole)
            prelim, update, factor = self._updates(whole, moment, last)
            raw.append(prelim)
            updates.append(update)
            factors.append(factor)
        largest = own.largest(torch.tensor(factors, dtype=torch.float64)).tolist() if wholes else []
        shares = self._shares(own, wholes, raw, updates)
        self._coeffs = []
        for whole, update, factor, share in zip(wholes, updates, largest, shares, strict=True):
            factor = self._clamped(factor * share + 1 - share, whole.state.get("last_factor", 1.0))
            whole.state["last_factor"] = factor
            self._coeffs.append(whole.state.get("lamb_coeff_freeze", 0.0) * factor)
            self._move(whole, update, self._coeffs[-1])

    def _begin(self, wholes: Sequence[Whole], moments: Sequence[Tensor]) -> None:
        """Choose what brings the momenta to one magnitude. Where they have none yet (joined since), 1."""
        log_dist(f"OneBitLamb: {self.freeze_step} steps done, momentum is compressed from now on.", [0])
        rms = [float(torch.linalg.vector_norm(m, dtype=torch.float64) / max(m.numel(), 1) ** 0.5) for m in moments]
        united = sum(rms) / len(rms)
        for whole, own in zip(wholes, rms, strict=True):
            whole.state.setdefault("scaling_coeff", united / own if own > 0 and united > 0 else 1.0)

    def _average(self, own: OwnReduction, moments: Sequence[Tensor]) -> None:
        """All momenta as one buffer; its errors begin again where the buffer has another length."""
        if not moments:
            return
        flat = torch.cat([moment.float() for moment in moments])
        if self.common.get("numel") != flat.numel():
            self.common.clear()
            self.common["numel"] = flat.numel()
        own.average_signs([flat], [self.common])
        for moment, values in zip(moments, flat.split([moment.numel() for moment in moments]), strict=True):
            moment.copy_(values)

    def _updates(self, whole: Whole, moment: Tensor, last: Tensor) -> tuple[list[Tensor], list[Tensor], float]:
        """Of this rank's parts: m / (sqrt(v) + eps), the same with weight decay, and how far v' has left v."""
        beta1, beta2 = whole.group["betas"]
        raw, updates, factor = [], [], 0.0
        for span in whole.spans:
            mean, square = span.of_param(moment), self._state(span, "exp_avg_sq")
            fresh = self._state(span, "exp_avg_sq_fresh")
            gradient = mean.sub(span.of_param(last), alpha=beta1).div_(1 - beta1)
            advance_squares_([fresh], [gradient], beta2)
            frozen, current = self._denominator(whole, square), self._denominator(whole, fresh)
            factor = max(factor, float((frozen / current).max())) if len(mean) else factor
            raw.append(mean / frozen)
            updates.append(self._with_decay(whole, span, raw[-1].clone()))
        return raw, updates, factor

    def _shares(
        self, own: OwnReduction, wholes: Sequence[Whole], raw: list[list[Tensor]], updates: list[list[Tensor]]
    ) -> list[float]:
        """Which share of each update is not weight decay: 1 without it."""
        if not any(whole.group["weight_decay"] for whole in wholes):
            return [1.0] * len(wholes)
        squares = torch.stack([torch.stack([_squares(a), _squares(b)]) for a, b in zip(raw, updates, strict=True)])
        norms = own.total(squares).sqrt().tolist()
        return [
            min(1.0, prelim / update) if whole.group["weight_decay"] and update > 0 else 1.0
            for whole, (prelim, update) in zip(wholes, norms, strict=True)
        ]

    def _clamped(self, factor: float, last: float) -> float:
        factor = min(max(factor, self.factor_min), self.factor_max)
        return min(max(factor, last * (1 - self.factor_threshold)), last * (1 + self.factor_threshold))

    def _state(self, span: RunSpan, key: str) -> Tensor:
        return span.of_run(state_of(self.state[span.run], key, span.run))

    def _denominator(self, whole: Whole, square: Tensor) -> Tensor:
        return denominators([square], whole.group["eps"], self.eps_inside_sqrt)[0]

    def _with_decay(self, whole: Whole, span: RunSpan, update: Tensor) -> Tensor:
        decay = whole.group["weight_decay"]
        return update.add_(span.of_run(span.run.data), alpha=decay) if decay else update

    def _norms(
        self, own: OwnReduction, wholes: Sequence[Whole], updates: Sequence[list[Tensor]]
    ) -> list[tuple[float, float]]:
        """(norm of the parameter, of its update), whole."""
        if not wholes:
            return []
        squares = [
            torch.stack([_squares([span.of_run(span.run.data) for span in whole.spans]), _squares(mine)])
            for whole, mine in zip(wholes, updates, strict=True)
        ]
        return [(weight, update) for weight, update in own.total(torch.stack(squares)).sqrt().tolist()]

    def _move(self, whole: Whole, updates: Sequence[Tensor], coeff: float) -> None:
        for span, update in zip(whole.spans, updates, strict=True):
            span.of_run(span.run.data).add_(update, alpha=-whole.group["lr"] * coeff)


def _squares(pieces: Sequence[Tensor]) -> Tensor:
    """[] the sum of squares, in double precision, on the CPU."""
    total = sum((piece.double().square().sum() for piece in pieces), torch.zeros((), dtype=torch.float64))
    return total.cpu()


def _trust_ratio(group: dict[str, Any], weight: float, update: float) -> float:
    if weight == 0 or update == 0:
        return 1.0
    return min(max(weight / update, group["min_coeff"]), group["max_coeff"])
