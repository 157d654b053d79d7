"""The 1-bit optimizers in plain PyTorch on one process: every rank's gradients, errors and messages, one after the other.

Uses torch only. The tests compare engines on several ranks with it, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


Step = Callable[[list[dict[str, Tensor]]], None]


@torch.no_grad()
def apply_(p: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """p -= lr * (update + weight_decay * p)."""
    if weight_decay:
        update = update.add(p, alpha=weight_decay)
    p.add_(update, alpha=-lr)


def onebit_adam(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    num_ranks: int,
    *,
    freeze_step: int,
    lr: float,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Simulated:
    """Train with 1-bit Adam (arXiv:2102.02888, algorithm 1)."""
    run = Simulated(model, num_ranks)
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
