"""`TiledFusedLogitsLoss`: logits and their loss tile by tile, so that the logits of a long sequence never exist as a whole.

For 100,000 tokens and a vocabulary of 128,000 the logits alone are 51 GB in fp32. Here a tile's logits live while its loss and
gradients are computed, in the forward already (*fused*: gradients of hidden states and head wait for the outer gradient, which
multiplies them), or, where the parameters come and go between modules (ZeRO stage 3), again in the backward (`tiled.py`).

Each tile's mean is weighted by the targets that count in it, so that the loss is that of the whole: by the mask where there is
one, else by the labels that are not ignored.

Invariant: the host never waits for a device. There the weights stay tensors, so it is not known which tiles have no target. Such
a tile is given label 0 everywhere, that its mean and gradients are numbers, and then weighs nothing. Labels on the CPU are read,
and tiles without targets are not differentiated.

After ALST (arXiv:2506.13996); the original weighs tiles alike, and its parameters' gradients ignore what the loss is multiplied by
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.parallel.sequence.inputs import IGNORED
from deepspeed.parallel.sequence.tiled import Summed, Weight, comes_and_goes, tile_bounds, tiled, trained
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.values import has_values


class TiledFusedLogitsLoss:
    """The loss of a head and labels, by tiles."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        module: Any,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        shards: int,
        compute_params: Iterable[Any] | None = None,
        output_reduction: str = "mean",
    ) -> Tensor:
        """The loss, a scalar. Differentiable in x and the parameters.

        fn(module, x, y), or fn(module, x, y, mask) with a mask, is a tile's loss: a mean over its targets, or with "sum" a sum.
        For a mean a tile without targets gets label 0 and mask 1 everywhere; its loss counts for nothing.
        x: [batch, sequence, hidden]; y, mask: [batch, sequence]. compute_params: default all of the module's.
        """
        _check(x, y, mask, output_reduction)
        bounds = tile_bounds(x.shape[1], shards)
        targets = _Targets(y, mask, bounds, _weights(y, mask, bounds, output_reduction))

        def run(index: int, tile: Tensor) -> Tensor:
            loss = fn(module, tile, *targets.of_tile(index))
            if loss.numel() != 1:
                raise DeepSpeedError(
                    f"TiledFusedLogitsLoss: fn gave a tensor of shape {tuple(loss.shape)}, not a scalar."
                )
            return loss.reshape(())

        join = Summed(targets.weights)
        params = trained(compute_params, module)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or bool(params))
        if not needs_grad or comes_and_goes(params):
            return tiled(run, join, bounds, 1, x, params)
        found = _Fused.apply(run, join, bounds, 1, x, *params)
        assert isinstance(found, Tensor), "one output"
        return found


def _check(x: Tensor, y: Tensor, mask: Tensor | None, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise DeepSpeedError(f'TiledFusedLogitsLoss: output_reduction = {reduction!r}: it is "mean" or "sum".')
    for name, tensor in (("y", y), ("mask", mask)):
        if tensor is not None and tensor.shape[:2] != x.shape[:2]:
            raise DeepSpeedError(
                f"TiledFusedLogitsLoss: {name} is {tuple(tensor.shape)}, x {tuple(x.shape)}: they agree in batch and sequence."
            )


def _weights(y: Tensor, mask: Tensor | None, bounds: list[tuple[int, int]], reduction: str) -> Sequence[Weight]:
    """Each tile's share of all targets: numbers where counting them keeps nobody waiting, scalars of the device elsewhere."""
    if reduction == "sum":
        return [1.0] * len(bounds)
    counted = mask if mask is not None else y != IGNORED if not y.is_floating_point() else torch.ones_like(y)
    found = torch.stack([counted[:, start:end].sum(dtype=torch.float32) for start, end in bounds])
    if counted.device.type != "cpu" or not has_values(counted):
        total = found.sum()
        return torch.where(total > 0, found / total, 0.0).unbind()
    counts: list[float] = found.tolist()
    total_count = sum(counts)
    return [count / total_count if total_count else 0.0 for count in counts]


class _Targets(NamedTuple):
    """What a tile's loss is told beside its hidden states."""

    y: Tensor
    mask: Tensor | None
    bounds: list[tuple[int, int]]
    weights: Sequence[Weight]

    def of_tile(self, index: int) -> tuple[Tensor, ...]:
        """Labels, and the mask where there is one; of a tile without targets something that a mean exists of."""
        own, weight = slice(*self.bounds[index]), self.weights[index]
        labels = self.y[:, own]
        if not labels.is_floating_point():
            labels = _filled(labels, weight, 0)
        return (labels,) if self.mask is None else (labels, _filled(self.mask[:, own], weight, 1))


def _filled(tile: Tensor, weight: Weight, value: int) -> Tensor:
    """The tile, or that value everywhere if it weighs nothing."""
    if isinstance(weight, Tensor):
        return tile.masked_fill(weight == 0, value)
    return tile if weight else torch.full_like(tile, value)


class _Fused(torch.autograd.Function):
    """Gradients are computed tile by tile in the forward, and multiplied by the outer one in the backward."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, join: Summed, bounds: list[tuple[int, int]], dim: int, x: Tensor, *params: Tensor
    ) -> Tensor:
        needs_x = x.requires_grad
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(params)
        outputs = []
        # Without any targets gradients are zero, as those of a whole loss, and not none.
        counting = [i for i, weight in enumerate(join.weights) if isinstance(weight, Tensor) or weight] or [0]
        for i, (start, end) in enumerate(bounds):
            tile = x.narrow(dim, start, end - start).detach().requires_grad_(needs_x)
            with torch.enable_grad():
                output = run(i, tile)
            outputs.append(output.detach())
            found: list[Tensor | None] = [None] * (needs_x + len(params))
            if i in counting:
                weight = join.weights[i]
                seed = weight.to(output) if isinstance(weight, Tensor) else output.new_full((), weight)
                found = list(
                    torch.autograd.grad(output, [*([tile] if needs_x else []), *params], seed, allow_unused=True)
                )
            if grad_x is not None:
                own, target = found.pop(0), grad_x.narrow(dim, start, end - start)
                _ = target.zero_() if own is None else target.copy_(own)
            for n, grad in enumerate(found):
                before = sums[n]
                sums[n] = grad if before is None else before if grad is None else before.add_(grad)
        ctx.grad_x, ctx.sums = grad_x, sums
        return join.join(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (outer,) = grads
        scaled = [None if grad is None else grad * outer.to(grad.dtype) for grad in (ctx.grad_x, *ctx.sums)]
        return None, None, None, None, *scaled
