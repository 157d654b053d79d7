"""Cross entropy of a linear head, a tile of tokens at a time, in the memory of one tile's logits.

`tile_model` takes it where a model's head is a plain `nn.Linear`; any other head or loss goes through `logits_loss.py`, where
autograd differentiates a tile and keeps three to four tensors of its logits' size. Here the gradient is written over the logits,

    logits [tokens, v]  ->  softmax(logits) - onehot(targets),    and from that  grad_x += . @ weight,  grad_weight += .^T @ x

some rows at a time, so that nothing else of that size exists. As in Liger Kernel's fused linear cross entropy (arXiv:2410.10989,
section 3.2) the gradients are made in the forward and multiplied by the outer one in the backward; they are divided by the number of
targets at the end, so that fp16 loses nothing below it.

Invariant: loss and gradients are those of `F.cross_entropy(F.linear(x, weight, bias).float(), targets)`, to the rounding of sums;
half-precision gradients of the weight are summed over tiles in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.sequence.inputs import IGNORED
from deepspeed.parallel.sequence.tiled import comes_and_goes

SLICE = 1 << 22
"""Elements of logits whose logarithms exist at once beside the tile."""


def is_served(head: Any) -> bool:
    """Whether a head is a plain linear layer that nobody listens to, of parameters that are there."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(head) is nn.Linear
        and "forward" not in head.__dict__
        and not any(getattr(head, name) for name in hooks)
        and all(type(param) is nn.Parameter for param in head.parameters())
        and not comes_and_goes(list(head.parameters()))
    )


def linear_cross_entropy(
    head: nn.Linear, x: Tensor, targets: Tensor, tokens: int, *, reduction: str = "mean"
) -> Tensor:
    """The loss, an fp32 scalar; "mean" over the targets that count (0 where none does) or "sum". Differentiable in x and the head.

    x: [..., hidden]; targets: [...], IGNORED or a class. tokens: how many at a time.
    """
    found = _LinearCrossEntropy.apply(x, targets, head.weight, head.bias, tokens, reduction)
    assert isinstance(found, Tensor), "one output"
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients made in the forward; the backward multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, reduction: str
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        sums = _Sums(ctx.needs_input_grad, x, weight.to(dtype), bias)
        classes = targets.flatten()
        loss = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            flat = x.flatten(0, -2).to(dtype)
            for start in range(0, len(classes), tokens):
                loss += sums.add(flat[start : start + tokens], classes[start : start + tokens], start)
            scale = (classes != IGNORED).sum().clamp_min(1).reciprocal() if reduction == "mean" else None
            ctx.grads = sums.finish(scale, x, weight)
        return loss if scale is None else loss * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        outer, (grad_x, grad_weight, grad_bias) = grads[0], ctx.grads
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return _times(grad_x, outer), None, _times(grad_weight, outer), _times(grad_bias, outer), None, None
        ctx.grads = None, None, None  # nobody asks again: the tensors themselves are handed on
        for grad in (grad_x, grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(outer)
        return grad_x, None, grad_weight, grad_bias, None, None


class _Sums:
    """Gradients of x, the weight and the bias, as tiles add to them."""

    def __init__(self, needs: tuple[bool, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, None if bias is None else bias.to(weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._x = torch.empty_like(x.flatten(0, -2), dtype=weight.dtype) if needs[0] else None
        self._of_weight = torch.zeros_like(weight, dtype=wide) if needs[2] else None
        self._of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[3] else None

    def add(self, x: Tensor, targets: Tensor, start: int) -> Tensor:
        """One tile's sum of losses."""
        logits = F.linear(x, self._weight, self._bias)
        loss = _loss_and_gradient(logits, targets)
        ignored = (targets == IGNORED)[:, None]
        if self._x is not None:
            own = self._x[start : start + len(x)]
            torch.mm(logits, self._weight, out=own)
            own.masked_fill_(ignored, 0)
        seen = x.masked_fill(ignored, 0)
        if self._of_weight is not None and self._of_weight.dtype == logits.dtype:
            self._of_weight.addmm_(logits.t(), seen)
        elif self._of_weight is not None:
            # The mean of the tile's tokens, whose sum may be beyond fp16.
            mean = torch.addmm(self._weight, logits.t(), seen, beta=0, alpha=1 / len(x))
            self._of_weight.add_(mean, alpha=len(x))
        if self._of_bias is not None:
            self._of_bias += torch.where(ignored, 0, logits).sum(0, dtype=self._of_bias.dtype)
        return loss

    def finish(self, scale: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, in the dtypes of what they are of."""
        grad_x = None if self._x is None else self._x.view_as(x).to(x.dtype)
        found = []
        for grad, dtype in ((grad_x, x.dtype), (self._of_weight, weight.dtype), (self._of_bias, weight.dtype)):
            if grad is not None and scale is not None:
                grad.mul_(scale)
            found.append(None if grad is None else grad.to(dtype))
        return tuple(found)


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses; logits become their gradient (rows of ignored targets: anything finite)."""
    total = logits.new_zeros((), dtype=torch.float32)
    rows = max(1, SLICE // logits.shape[1])
    for start in range(0, len(logits), rows):
        own, classes = logits[start : start + rows], targets[start : start + rows, None]
        counts = classes != IGNORED
        classes = torch.where(counts, classes, 0)
        log_p = F.log_softmax(own, dim=-1, dtype=torch.float32)
        total -= torch.where(counts, log_p.gather(1, classes), 0).sum()
        torch.exp(log_p, out=log_p)
        log_p.scatter_add_(1, classes, log_p.new_full((), -1.0).expand_as(classes))
        own.copy_(log_p)
    return total


def _times(grad: Tensor | None, outer: Tensor) -> Tensor | None:
    return None if grad is None else grad * outer.to(grad.dtype)
