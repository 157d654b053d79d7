"""The 1-bit optimizers in plain PyTorch on one process: every rank's gradients, errors and messages, one after the other.

Uses torch only. The tests compare engines on several ranks with it, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Batch, rank_share, total_loss


@dataclass
class Compression:
    """A compressed mean of one tensor over `num_ranks` simulated ranks, with all of their errors."""

    num_ranks: int
    numel: int
    padded: int = field(init=False)

    def __post_init__(self) -> None:
        unit = self.num_ranks * math.lcm(self.num_ranks, 8)
        self.padded = math.ceil(self.numel / unit) * unit
        self.worker = [torch.zeros(self.padded) for _ in range(self.num_ranks)]
        self.server = [torch.zeros(self.padded // self.num_ranks) for _ in range(self.num_ranks)]

    def mean(self, of_ranks: Sequence[Tensor]) -> Tensor:
        """[numel], what every rank has after the exchange."""
        if self.num_ranks == 1:
            return of_ranks[0]
        sent = []
        for x, error in zip(of_ranks, self.worker, strict=True):
            padded = torch.zeros(self.padded)
            padded[: self.numel] = x
            sent.append(_signs(padded, error).view(self.num_ranks, -1))
        answers = []
        for rank in range(self.num_ranks):
            total = torch.zeros(self.padded // self.num_ranks)
            for said in sent:
                total += said[rank]
            answers.append(_signs(total / self.num_ranks, self.server[rank]))
        return torch.cat(answers)[: self.numel]


def _signs(x: Tensor, error: Tensor) -> Tensor:
    """scale * sign of x + error; what that leaves out stays in `error`."""
    error += x
    scale = (error.double().square().sum() / len(error)).sqrt().float()
    said = torch.where(error >= 0, scale, -scale)
    error -= said
    return said


class Simulated:
    """Ranks of one model, trained together in one process. `local[rank][name]` are a step's gradients."""

    def __init__(self, model: nn.Module, num_ranks: int) -> None:
        torch.set_num_threads(1)
        self.model = copy.deepcopy(model)
        self.num_ranks = num_ranks
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.losses: list[float] = []

    def gradients(self, micro_batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Every rank's own gradients of the mean over its micro-batches."""
        found, losses = [], []
        for rank in range(self.num_ranks):
            self.model.zero_grad()
            for batch in micro_batches:
                loss = total_loss(self.model(*rank_share(batch, rank, self.num_ranks))) / len(micro_batches)
                loss.backward()
                losses.append(loss.item())
            found.append({name: p.grad.clone() for name, p in self.params.items() if p.grad is not None})
        self.losses.append(sum(losses) / self.num_ranks)
        return found

    def mean(self, local: Sequence[dict[str, Tensor]], name: str) -> Tensor:
        """The mean of one gradient, added up in rank order."""
        total = local[0][name].clone()
        for theirs in local[1:]:
            total += theirs[name]
        return total / self.num_ranks


class Replayed(Simulated):
    """The same of weights by name, whose gradients are known: batch i is every rank's gradients of step i.

    dtype: of the gradients, to which their mean is rounded. scale: of the loss, which is divided out afterwards.
    """

    def __init__(
        self, weights: dict[str, Tensor], num_ranks: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> None:
        model = nn.Module()
        for name, weight in weights.items():
            model.register_parameter(name.replace(".", "/"), nn.Parameter(weight.clone()))
        super().__init__(model, num_ranks)
        self._dtype, self._scale = dtype, scale

    def gradients(self, micro_batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Every rank's, as they were recorded."""
        return [
            {name.replace(".", "/"): grad.float() / self._scale for name, grad in theirs.items()}
            for theirs in micro_batches
        ]

    def mean(self, local: Sequence[dict[str, Tensor]], name: str) -> Tensor:
        """See Simulated: of the scaled gradients, in their dtype."""
        mean = super().mean([{name: theirs[name] * self._scale} for theirs in local], name)
        return mean.to(self._dtype).float() / self._scale


Step = Callable[[list[dict[str, Tensor]]], None]


@torch.no_grad()
def apply_(p: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """p -= lr * (update + weight_decay * p)."""
    if weight_decay:
        update = update.add(p, alpha=weight_decay)
    p.add_(update, alpha=-lr)


def onebit_adam(
    model: nn.Module | Simulated,
    batches: Sequence[Sequence[Any]],
    num_ranks: int,
    *,
    freeze_step: int,
    lr: float,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Simulated:
    """Train with 1-bit Adam (arXiv:2102.02888, algorithm 1); the model may be a run that was made already."""
    run = model if isinstance(model, Simulated) else Simulated(model, num_ranks)
    moments = {name: torch.zeros_like(p) for name, p in run.params.items()}
    squares = {name: torch.zeros_like(p) for name, p in run.params.items()}
    compressions = {name: Compression(num_ranks, p.numel()) for name, p in run.params.items()}
    for step, micro_batches in enumerate(batches):
        local = run.gradients(micro_batches)
        with torch.no_grad():
            for name, p in run.params.items():
                m, v = moments[name], squares[name]
                if step < freeze_step:
                    grad = run.mean(local, name)
                    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
                    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
                else:
                    mine = [m.mul(betas[0]).add_(theirs[name], alpha=1 - betas[0]) for theirs in local]
                    m.copy_(compressions[name].mean([x.reshape(-1) for x in mine]).view_as(m))
                apply_(p, m / (v.sqrt() + eps), lr, weight_decay)
    return run


def zero_one_adam(
    model: nn.Module | Simulated,
    batches: Sequence[Sequence[Any]],
    num_ranks: int,
    *,
    full_steps: Sequence[int],
    freeze_step: int,
    average_steps: Sequence[int],
    lr: float,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Simulated:
    """Train with 0/1 Adam (arXiv:2202.06009, algorithm 1). Steps count from 1; v is updated in `full_steps`, frozen after
    `freeze_step`, and local steps are averaged in `average_steps`."""
    run = model if isinstance(model, Simulated) else Simulated(model, num_ranks)
    ranks = range(num_ranks)
    copies = [copy.deepcopy(run.model) for _ in ranks]
    params = [{n: p for n, p in one.named_parameters() if p.requires_grad} for one in copies]
    moments = [{name: torch.zeros_like(p) for name, p in run.params.items()} for _ in ranks]
    buffers = [{name: torch.zeros_like(p) for name, p in run.params.items()} for _ in ranks]
    squares = {name: torch.zeros_like(p) for name, p in run.params.items()}
    compressions = {name: Compression(num_ranks, p.numel()) for name, p in run.params.items()}
    bases: dict[str, Tensor] = {}
    since = 0.0
    for step, micro_batches in enumerate(batches, 1):
        if step == freeze_step + 1:
            compressions = {name: Compression(num_ranks, p.numel()) for name, p in run.params.items()}
        local = []
        for rank in ranks:  # each rank's gradients are of its own weights
            run.model.load_state_dict(copies[rank].state_dict())
            local.append(run.gradients(micro_batches)[rank])
        since += lr
        with torch.no_grad():
            for name in run.params:
                v = squares[name]
                if step in full_steps:
                    shared = run.mean(local, name)
                    v.mul_(betas[1]).addcmul_(shared, shared, value=1 - betas[1])
                elif step <= freeze_step:
                    shared = compressions[name].mean([theirs[name].reshape(-1) for theirs in local]).view_as(v)
                for rank in ranks:
                    m, p = moments[rank][name], params[rank][name]
                    m.mul_(betas[0]).add_(shared if step <= freeze_step else local[rank][name], alpha=1 - betas[0])
                    update = (m / (v.sqrt() + eps)).add(p, alpha=weight_decay)
                    if step <= freeze_step or step - 1 in (freeze_step, *average_steps):
                        bases[name] = p.clone()
                    p.add_(update, alpha=-lr)
                    if step > freeze_step:
                        buffers[rank][name].add_(update, alpha=-lr)
                if step > freeze_step and step in average_steps:
                    for rank in ranks:
                        params[rank][name].copy_(bases[name])
                        buffers[rank][name].mul_(v.sqrt() + eps)
                    mean = compressions[name].mean([buffers[rank][name].reshape(-1) for rank in ranks]).view_as(v)
                    for rank in ranks:
                        moments[rank][name].copy_(mean).div_(-since)
                        params[rank][name].add_(mean / (v.sqrt() + eps))
                        buffers[rank][name].zero_()
            if step <= freeze_step or step in average_steps:
                since = 0.0
    run.model.load_state_dict(copies[0].state_dict())
    return run


def onebit_lamb(
    model: nn.Module | Simulated,
    batches: Sequence[Sequence[Any]],
    num_ranks: int,
    *,
    freeze_step: int,
    lr: float,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    coeff_beta: float = 0.9,
    factor_max: float = 4.0,
    factor_min: float = 0.5,
    factor_threshold: float = 0.1,
) -> Simulated:
    """Train with 1-bit LAMB (arXiv:2104.06069, algorithm 1), the parameters in the order of `params`."""
    run = model if isinstance(model, Simulated) else Simulated(model, num_ranks)
    zeros = {name: torch.zeros_like(p) for name, p in run.params.items()}
    moments, squares, fresh = ({name: t.clone() for name, t in zeros.items()} for _ in range(3))
    coeffs, factors = dict.fromkeys(zeros, 0.0), dict.fromkeys(zeros, 1.0)
    scales: dict[str, float] = {}
    whole = Compression(num_ranks, sum(t.numel() for t in zeros.values()))
    for step, micro_batches in enumerate(batches):
        local = run.gradients(micro_batches)
        with torch.no_grad():
            if step < freeze_step:
                for name, p in run.params.items():
                    grad, m, v = run.mean(local, name), moments[name], squares[name]
                    m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
                    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
                    u = (m / (v.sqrt() + eps)).add(p, alpha=weight_decay)
                    weight, update = (float(x.double().square().sum().sqrt()) for x in (p, u))
                    ratio = min(max(weight / update, 0.01), 10.0) if weight and update else 1.0
                    if ratio != 1.0:
                        coeffs[name] = coeff_beta * coeffs[name] + (1 - coeff_beta) * ratio
                    p.add_(u, alpha=-lr * ratio)
                continue
            if not scales:
                rms = {n: float(m.double().norm() / m.numel() ** 0.5) for n, m in moments.items()}
                united = sum(rms.values()) / len(rms)
                scales = {n: united / one if one > 0 and united > 0 else 1.0 for n, one in rms.items()}
                fresh = {name: v.clone() for name, v in squares.items()}
            before = {name: m.clone() for name, m in moments.items()}
            sent = [
                torch.cat(
                    [
                        m.mul(betas[0]).add_(theirs[n], alpha=1 - betas[0]).mul_(scales[n]).reshape(-1)
                        for n, m in moments.items()
                    ]
                )
                for theirs in local
            ]
            means = whole.mean(sent).split([m.numel() for m in moments.values()])
            for (name, p), mean in zip(run.params.items(), means, strict=True):
                m, v, now = moments[name], squares[name], fresh[name]
                m.copy_(mean.view_as(m)).div_(scales[name])
                grad = m.sub(before[name], alpha=betas[0]).div_(1 - betas[0])
                now.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
                prelim = m / (v.sqrt() + eps)
                factor = float(((v.sqrt() + eps) / (now.sqrt() + eps)).max())
                u = prelim.add(p, alpha=weight_decay)
                if weight_decay:
                    share = min(1.0, float(prelim.double().square().sum().sqrt() / u.double().square().sum().sqrt()))
                    factor = factor * share + 1 - share
                factor, last = min(max(factor, factor_min), factor_max), factors[name]
                factor = min(max(factor, last * (1 - factor_threshold)), last * (1 + factor_threshold))
                factors[name] = factor
                p.add_(u, alpha=-lr * coeffs[name] * factor)
    return run
