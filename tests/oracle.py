"""The oracle: the training step in plain PyTorch on one process, which every parallel run must equal.

Parallel tests call `train_plain` with the model, the joined batches of all ranks and the policy, and compare losses and
weights (`assert_close_weights`). It uses torch only, so that an error of the package cannot hide in both.

What it mirrors, in order (G: gradient in the accumulation dtype, `S`: loss scale, `A`: micro-batches per step):

    per micro-batch and rank   backward of loss * S / A through the model in `dtype`
    reduction                  sum of the ranks' gradients in fp32, in rank order, / ranks, rounded to G's dtype;
                               per micro-batch, added up (ZeRO stages 2, 3), or of the local sums at the boundary (0, 1)
    boundary                   g = G / S in fp32; inf or nan: skip; g /= max(1, (norm + 1e-6) / clip)
    update                     the optimizer on fp32 masters, which start exact; the model gets them rounded to `dtype`

In fp32 the ranks' samples run as one batch, with one loss: the textbook loop. A parameter that had no gradient on any
rank in a step is not stepped, as optimizers skip `grad is None`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.models import Batch, rank_share, to_dtype, total_loss

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(kw_only=True)
class LossScale:
    """A static scale, or with a `window` the dynamic one of fp16 training (arXiv:1710.03740, with hysteresis)."""

    scale: float = 1.0
    window: int | None = None
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0
    _step: int = 0
    _last_overflow: int = -1
    _left: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._left = self.hysteresis

    def update(self, overflow: bool) -> None:
        """Count one step."""
        if self.window is None:
            return
        if overflow:
            if self._left > 1 and self.hysteresis != 1:
                self._left -= 1
            else:
                self.scale = max(self.scale / 2, self.minimum)
            self._last_overflow = self._step
        else:
            stable = self._step - self._last_overflow - 1
            grows = stable > 0 and stable % self.window == 0
            self.scale *= 2 if grows else 1
            if self.consecutive_hysteresis or grows:
                self._left = self.hysteresis
        self._step += 1


@dataclass
class Trained:
    """What a run gave: per step the mean loss, the norm before clipping (None if skipped) and the loss scale used."""

    losses: list[float]
    weights: dict[str, Tensor]
    """The state dict with the fp32 master of every trained parameter."""
    model: nn.Module
    """The trained copy, in the policy's dtype."""
    grad_norms: list[float | None]
    loss_scales: list[float]

    @property
    def num_skipped(self) -> int:
        """Steps without an update."""
        return self.grad_norms.count(None)


def train_plain(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    make_optimizer: MakeOptimizer,
    *,
    clip: float = 0.0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    accumulation_dtype: torch.dtype | None = None,
    reduce_at: Literal["micro_batch", "boundary"] = "micro_batch",
    loss_scale: LossScale | None = None,
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Trained:
    """Train a copy of `model` on batches[step][micro] of all ranks joined; the model given stays as it is.

    `world_size` says how the samples divide over ranks; it matters only below fp32, where the order of rounding is
    part of the policy. `accumulation_dtype` is `dtype` unless given. `autocast` keeps the weights in `dtype` and
    computes in another. The optimizer gets the fp32 masters in the order of `model.parameters()`, frozen ones left out.
    """
    torch.set_num_threads(1)  # as in the workers: the number of threads changes the order of sums
    model = copy.deepcopy(model)
    exact = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model.to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    masters = params if dtype == torch.float32 else [nn.Parameter(p.float()) for p in exact]
    optimizer = make_optimizer(masters)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    scaler = copy.copy(loss_scale) if loss_scale else LossScale()
    num_chunks = 1 if dtype == torch.float32 and autocast is None else world_size
    accumulator = accumulation_dtype or dtype
    trained = Trained([], {}, model, [], [])
    for micro_batches in batches:
        scale = scaler.scale
        reduced, used, loss = _gradients(
            model, params, micro_batches, num_chunks, autocast, scale, accumulator, reduce_at
        )
        grads = [g.float() / scale for g in reduced]
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))
        overflow = not all(bool(g.isfinite().all()) for g in grads)
        scaler.update(overflow)
        trained.losses.append(loss)
        trained.loss_scales.append(scale)
        trained.grad_norms.append(None if overflow else norm)
        if overflow:
            continue
        divisor = max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0
        for master, grad, is_used in zip(masters, grads, used, strict=True):
            master.grad = grad / divisor if is_used else None
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
    trained.weights = _with_masters(model, params, masters)
    return trained


def _gradients(
    model: nn.Module,
    params: list[nn.Parameter],
    micro_batches: Sequence[Batch],
    num_ranks: int,
    autocast: torch.dtype | None,
    scale: float,
    accumulator: torch.dtype,
    reduce_at: str,
) -> tuple[list[Tensor], list[bool], float]:
    """The reduced, still scaled gradients of one step, whether each was there at all, and the mean loss."""
    used = [False] * len(params)
    sums: list[list[Tensor]] = [[torch.zeros_like(p, dtype=accumulator) for p in params] for _ in range(num_ranks)]
    reduced = [torch.zeros_like(p, dtype=accumulator) for p in params]
    losses = []
    for batch in micro_batches:
        of_ranks = []
        for rank in range(num_ranks):
            share = to_dtype(rank_share(batch, rank, num_ranks), params[0].dtype)
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = total_loss(model(*share))
            losses.append(float(loss.detach()))
            (loss * (scale / len(micro_batches))).backward()
            used = [was or p.grad is not None for was, p in zip(used, params, strict=True)]
            of_ranks.append([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            for param in params:
                param.grad = None
        if reduce_at == "micro_batch":
            reduced = [
                (a.float() + m).to(accumulator) for a, m in zip(reduced, _mean_over_ranks(of_ranks), strict=True)
            ]
        else:
            for total, grads in zip(sums, of_ranks, strict=True):
                total[:] = [t + g.to(accumulator) for t, g in zip(total, grads, strict=True)]
    if reduce_at == "boundary":
        reduced = [mean.to(accumulator) for mean in _mean_over_ranks(sums)]
    return reduced, used, sum(losses) / len(losses)


def _mean_over_ranks(of_ranks: list[list[Tensor]]) -> list[Tensor]:
    """Per parameter: summed in fp32 in rank order, and divided; the caller rounds once."""
    return [sum(g.float() for g in grads) / len(of_ranks) for grads in zip(*of_ranks, strict=True)]


def _with_masters(model: nn.Module, params: list[nn.Parameter], masters: list[nn.Parameter]) -> dict[str, Tensor]:
    master_of = {id(p): m.detach() for p, m in zip(params, masters, strict=True)}
    by_name = {name: master_of.get(id(p)) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: (v if (m := by_name.get(name)) is None else m).clone() for name, v in model.state_dict().items()}


def assert_close_weights(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Same names, and per tensor the largest difference within `tolerance` of its largest value."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    for name, want in expected.items():
        got = actual[name].float()
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = (got - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: relative difference {error:.2e} > {tolerance:g}"
