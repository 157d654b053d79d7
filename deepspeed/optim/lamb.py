"""LAMB: Adam's update of each parameter, scaled by the ratio of the parameter's norm to the update's.

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. Needs PARAMETER_NORMS: a parameter cut over
several ranks has its squared norms summed over them in one all-reduce of 2 numbers per parameter of the model.

Invariant: one `sum_over_shards` per step, whatever runs this rank has; nothing waits for the device.

After arXiv:1904.00962, algorithm 2, with the ratio clamped to [min_coeff, max_coeff] where both norms are nonzero.
State per tensor: `step`, `exp_avg`, `exp_avg_sq`; moments in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.optim import kernels
from deepspeed.optim.adam import adam_batches
from deepspeed.optim.traits import Needs, ShardableOptimizer, Sharding, loss_of
from deepspeed.utils.errors import DeepSpeedError


@dataclass(frozen=True, slots=True)
class _Part:
    """The pieces one group has here: position i belongs to parameter `owners[i]`, views of weights and of updates."""

    group: dict[str, Any]
    owners: Tensor
    weights: list[Tensor]
    updates: list[Tensor]


class FusedLamb(ShardableOptimizer):
    """LAMB. Clipping by norm is the engine's: `max_grad_norm` is there for its place in the signature and must be 0."""

    needs = Needs.PARAMETER_NORMS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if max_grad_norm > 0:
            raise DeepSpeedError(
                f"max_grad_norm = {max_grad_norm}: FusedLamb does not clip; the engine does.\n"
                f'  Remove max_grad_norm and set "gradient_clipping": {max_grad_norm} at the top of the configuration.'
            )
        self.eps_inside_sqrt = eps_inside_sqrt
        self._ratios: list[Tensor] = []
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
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Collective where `sharding` is set."""
        loss = loss_of(closure)
        sharding = self._sharding()
        parts = [part for group in self.param_groups for part in self._parts(group, sharding)]
        norms = _norms(parts, sharding)
        self._ratios = [_trust_ratios(part, norms) for part in parts]
        for part, ratios in zip(parts, self._ratios, strict=True):
            torch._foreach_mul_(part.updates, list(ratios.unbind()))
            torch._foreach_add_(part.weights, part.updates, alpha=-part.group["lr"])
        return loss

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, one per parameter that has a piece here. Waits for the device."""
        return [ratio for ratios in self._ratios for ratio in ratios.tolist()]

    def _parts(self, group: dict[str, Any], sharding: Sharding) -> Iterable[_Part]:
        for batch in adam_batches(self, group, fp32_states=True).values():
            runs = batch.params
            kernels.count_steps_(batch.steps)
            grads = [grad.to(moment.dtype) for grad, moment in zip(batch.grads, batch.exp_avgs, strict=True)]
            kernels.advance_moments_(batch.exp_avgs, batch.exp_avg_sqs, grads, group["betas"])
            updates = kernels.adam_direction(
                batch.exp_avgs, batch.exp_avg_sqs, batch.steps, betas=group["betas"], eps=group["eps"],
                bias_correction=group["bias_correction"], eps_inside_sqrt=self.eps_inside_sqrt,
            )  # fmt: skip
            if group["weight_decay"]:
                torch._foreach_add_(updates, runs, alpha=group["weight_decay"])
            pieces = [(i, piece) for i, run in enumerate(runs) for piece in sharding.pieces(run)]
            yield _Part(
                group,
                torch.tensor([piece.index for _, piece in pieces], device=runs[0].device),
                [piece.of_run(runs[i]) for i, piece in pieces],
                [piece.of_run(updates[i]) for i, piece in pieces],
            )


def _norms(parts: list[_Part], sharding: Sharding) -> Tensor:
    """[num_params, 2]: norms of every whole parameter and of its update; zeros for those with no piece here."""
    device = parts[0].owners.device if parts else torch.device("cpu")
    squares = torch.zeros(sharding.num_params, 2, device=device)
    for part in parts:
        for column, tensors in enumerate((part.weights, part.updates)):
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
            squares[:, column].index_add_(0, part.owners, norms.square())
    return sharding.sum_over_shards(squares).sqrt()


def _trust_ratios(part: _Part, norms: Tensor) -> Tensor:
    """min_coeff <= ||p|| / ||u|| <= max_coeff for each piece of a part; 1 where a norm is zero."""
    weight, update = norms[part.owners].unbind(1)
    ratios = (weight / update).clamp(part.group["min_coeff"], part.group["max_coeff"])
    return torch.where((weight > 0) & (update > 0), ratios, 1.0)
