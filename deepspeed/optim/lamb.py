"""LAMB: Adam's update of each parameter, scaled by the ratio of the parameter's norm to the update's.

Built by `optim.build` or by the user; stepped by ZeRO on runs, or alone. Needs PARAMETER_NORMS: a parameter cut over
several ranks has its squared norms summed over them in one all-reduce of 2 numbers per parameter of the model.

Moments advance in a first pass that sums the squares of p and of its update; the second makes the updates again.

Invariant: one `sum_over_shards` per step, whatever runs this rank has; nothing waits for the device.

After arXiv:1904.00962, algorithm 2, with the ratio clamped to [min_coeff, max_coeff] where both norms are nonzero.
State per tensor: `step`, `exp_avg`, `exp_avg_sq`; moments in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.kernels.native_optimizers import Lows
from deepspeed.optim import kernels
from deepspeed.optim.adam import ADAM_STATE, AdamBatch, adam_batches
from deepspeed.optim.cpu import by_group, check_run, complete_state
from deepspeed.optim.traits import FusedRun, Needs, RunPiece, ShardableOptimizer, Sharding, StepsFused, loss_of
from deepspeed.utils.errors import DeepSpeedError


@dataclass(frozen=True, slots=True)
class _Part:
    """The pieces one batch has here: position i belongs to parameter `owners[i]`; views of the batch's tensors."""

    settings: kernels.LambSettings
    coefficients: tuple[float, float]
    owners: Tensor
    batch: AdamBatch
    lows: Lows | None
    squares: Tensor
    updates: list[Tensor] | None


class FusedLamb(ShardableOptimizer, StepsFused):
    """LAMB, on any device. Clipping by norm is the engine's: `max_grad_norm` is there for its place in the signature and must be 0."""

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

    @property
    def state_names(self) -> dict[str, torch.dtype]:
        """The state tensors of a run and their dtypes."""
        return dict.fromkeys(ADAM_STATE, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient. Collective where `sharding` is set."""
        loss = loss_of(closure)
        batches = [
            (group, batch, None)
            for group in self.param_groups
            for batch in adam_batches(self, group, fp32_states=True).values()
        ]
        self._step(batches, 1.0)
        return loss

    @torch.no_grad()
    def step_fused(self, runs: Sequence[tuple[dict[str, Any], FusedRun]], grad_factor: float) -> None:
        """One step of all runs, from `grad * grad_factor`; see `StepsFused`. Collective where `sharding` is set."""
        batches: list[tuple[dict[str, Any], AdamBatch, Lows | None]] = []
        for group, members in by_group(runs):
            batch = AdamBatch([], [], [], [], [])
            for run in members:
                check_run(self, run)
                batch.add(
                    run.master, run.grad, complete_state(self.state[run.master], run.master, ADAM_STATE, torch.float32)
                )
            batches.append((group, batch, [run.low for run in members]))
        self._step(batches, grad_factor)

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, one per parameter that has a piece here. Waits for the device."""
        return [ratio for ratios in self._ratios for ratio in ratios.tolist()]

    def _step(self, batches: Sequence[tuple[dict[str, Any], AdamBatch, Lows | None]], grad_factor: float) -> None:
        sharding = self._sharding()
        parts = [self._advance(group, batch, lows, grad_factor, sharding) for group, batch, lows in batches]
        norms = _norms(parts, sharding)
        self._ratios = [_trust_ratios(part, norms) for part in parts]
        for part, ratios in zip(parts, self._ratios, strict=True):
            batch = part.batch
            kernels.lamb_apply_(
                batch.params,
                batch.exp_avgs,
                batch.exp_avg_sqs,
                batch.steps,
                part.settings,
                part.updates,
                ratios,
                part.lows,
            )

    def _advance(
        self, group: dict[str, Any], batch: AdamBatch, lows: Lows | None, grad_factor: float, sharding: Sharding
    ) -> _Part:
        """Advance the moments of a batch, piece by piece."""
        kernels.count_steps_(batch.steps)
        settings = kernels.LambSettings(
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            group["bias_correction"],
            self.eps_inside_sqrt,
        )
        pieces = [(i, piece) for i, run in enumerate(batch.params) for piece in sharding.pieces(run)]
        params, grads, means, squares_of = (
            [piece.of_run(tensors[i]) for i, piece in pieces]
            for tensors in (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs)
        )
        cut = AdamBatch(params, grads, means, squares_of, [batch.steps[i] for i, _ in pieces])
        squares, updates = kernels.lamb_moments_(*cut, settings, grad_factor)
        return _Part(
            settings,
            (group["min_coeff"], group["max_coeff"]),
            torch.tensor([piece.index for _, piece in pieces], device=squares.device, dtype=torch.long),
            cut,
            None if lows is None else [_cut(lows[i], piece) for i, piece in pieces],
            squares,
            updates,
        )


def _cut(low: Tensor | None, piece: RunPiece) -> Tensor | None:
    return None if low is None else piece.of_run(low)


def _norms(parts: list[_Part], sharding: Sharding) -> Tensor:
    """[num_params, 2]: norms of every whole parameter and of its update; zeros for those with no piece here."""
    device = parts[0].owners.device if parts else torch.device("cpu")
    squares = torch.zeros(sharding.num_params, 2, device=device)
    for part in parts:
        squares.index_add_(0, part.owners, part.squares)
    return sharding.sum_over_shards(squares).sqrt()


def _trust_ratios(part: _Part, norms: Tensor) -> Tensor:
    """min_coeff <= ||p|| / ||u|| <= max_coeff for each piece of a part; 1 where a norm is zero."""
    weight, update = norms[part.owners].unbind(1)
    ratios = (weight / update).clamp(*part.coefficients)
    return torch.where((weight > 0) & (update > 0), ratios, 1.0)
