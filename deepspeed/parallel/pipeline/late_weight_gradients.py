"""Weight gradients later: the backward of a linear layer in two halves, of which the second can wait.

Used by the executor around forwards and input gradients of schedules that have `W` actions. While `Later` is on, `F.linear`
with a trained leaf weight runs as a function whose backward gives the gradient of the input alone, and puts

    weight, bias, input, gradient of the output

into the queue of the micro-batch; `Queue.run` computes the products then, and has autograd accumulate them on the leaves, so
that hooks on parameters (ZeRO's reducer) fire once, when the gradient is there. All else, norms and embeddings, has its
whole backward at once: it is cheap, or has nothing before it.

Invariant: the same products in the same order per parameter as autograd's own, bit for bit.
After zero-bubble pipelines (arXiv:2401.10241), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Queue:
    """What one micro-batch owes at one stage."""

    def __init__(self) -> None:
        self._owed: list[tuple[nn.Parameter, nn.Parameter | None, Tensor, Tensor]] = []

    def add(self, weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, gradient: Tensor) -> None:
        """Put off one layer's weight gradients. x: [..., in], gradient: [..., out]."""
        self._owed.append((weight, bias, x, gradient))

    def run(self) -> None:
        """Compute them, in the order in which they came."""
        owed, self._owed = self._owed, []
        for weight, bias, x, gradient in owed:
            rows = gradient.reshape(-1, gradient.shape[-1])
            with torch.no_grad():
                leaves, values = [weight], [rows.t().mm(x.reshape(-1, x.shape[-1]))]
                if bias is not None and bias.requires_grad:
                    leaves.append(bias)
                    values.append(rows.sum(0))
            torch.autograd.backward(leaves, values)

    def take_over(self, other: Queue) -> None:
        """Owe what another one does, too, after what is here."""
        self._owed += other._owed
        other._owed = []


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight is no input to autograd: it is read detached, and its gradient is queued."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: _Ref, bias: _Ref | None, queue: Callable[[], Queue]) -> Tensor:
        ctx.weight, ctx.bias, ctx.queue = weight.param, bias.param if bias is not None else None, queue
        ctx.save_for_backward(x)
        return F.linear(x, weight.param.detach(), bias.param.detach() if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = grads
        (x,) = ctx.saved_tensors
        ctx.queue().add(ctx.weight, ctx.bias, x, gradient)
        rows = gradient.reshape(-1, gradient.shape[-1])
        return rows.mm(ctx.weight.detach()).view(x.shape), None, None, None


class _Ref:
    """Hides a parameter from autograd's view of a function's inputs."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param


class Later(TorchFunctionMode):
    """While it is on, linear layers put their weight gradients off into `queue`, which is asked for in backward."""

    def __init__(self, queue: Callable[[], Queue]) -> None:
        super().__init__()
        self._queue = queue

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and torch.is_grad_enabled() and len(args) >= 2:
            x, weight = args[0], args[1]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            if _can_wait(x, weight, bias):
                return _Linear.apply(x, _Ref(weight), _Ref(bias) if bias is not None else None, self._queue)
        return func(*args, **(kwargs or {}))


def _can_wait(x: Any, weight: Any, bias: Any) -> bool:
    if not (isinstance(x, Tensor) and x.requires_grad and x.dim() > 1):
        return False
    if not (isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad and weight.dtype is x.dtype):
        return False
    return (bias is None or (isinstance(bias, nn.Parameter) and bias.is_leaf)) and not torch.is_autocast_enabled(
        x.device.type
    )
