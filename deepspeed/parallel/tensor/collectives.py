"""What tensor-parallel layers send: each function's backward is its partner's forward.

Used by `layers` and by the hooks of `apply`, over the ranks of the mesh's role "tensor".

    enter   f   forward: the same tensor      backward: gradients of all ranks are summed
    leave   g   forward: parts are summed     backward: the same gradient
    gather      forward: slices are joined    backward: the own slice
    split       forward: the own slice        backward: slices are joined

Layers that read one tensor (q, k and v; gate and up) share one `enter`: autograd adds their gradients before they are sent, so
that a layer of a transformer sends twice in forward and twice in backward, 8 (t-1)/t b s h elements of b s h activations.

Invariant: every rank of the group launches the same collectives in the same order, and all have the bits of one result: each
element is summed by one rank, and handed on.
After Megatron-LM (arXiv:1909.08053), sec. 3, whose names f and g these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.recorder import watched

Context = Any


class TensorGroup:
    """The ranks that have pieces of one layer. `group` is None where a rank is alone.

    Copies of a module share it, as they share the process group.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.num_sent_bytes = 0
        """Payload of all collectives so far, as a ring moves it."""
        self.wait_for: Callable[[Any], None] | None = None
        """Waits for a collective in another way than by its own `wait`, if anybody knows one."""
        self._entered: tuple[Tensor, int, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> TensorGroup:
        return self

    def __copy__(self) -> TensorGroup:
        return self

    def enter(self, x: Tensor) -> Tensor:
        """`x`, for layers that hold a part of a product's outputs each."""
        if self.size == 1:
            return x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        known = self._entered
        if known is not None and known[0] is x and known[1] == x._version:
            return known[2]
        entered: Tensor = _Enter.apply(x, self)
        self._entered = (x, x._version, entered)
        return entered

    def forget(self) -> None:
        """End of the layers that share an `enter`; the tensor is no longer held."""
        self._entered = None

    def leave(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""
        self.forget()
        return x if self.size == 1 else _Leave.apply(x, self)

    def gather(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """All ranks' slices of the last dim, whose lengths are `lengths`, end to end."""
        return x if self.size == 1 else _Gather.apply(x, self, tuple(lengths))

    def split(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """This rank's slice of the last dim."""
        return x if self.size == 1 else _Split.apply(x, self, tuple(lengths))

    # Without gradients. -----------------------------------------------------------------------------------------------

    def start_sum(self, x: Tensor) -> Any:
        """Begin to sum `x` over the ranks in place; `wait()` of what is returned ends it."""
        self.count(2 * x.nbytes)
        return dist.all_reduce(x, group=self.group, async_op=True)

    def sum_(self, x: Tensor) -> Tensor:
        """`x` summed over the ranks, in place; x is contiguous."""
        if self.size > 1:
            with watched("tensor.all_reduce", x.nbytes, self.size):
                work = self.start_sum(x)
                work.wait() if self.wait_for is None else self.wait_for(work)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """The largest of the ranks' values, in place."""
        if self.size > 1:
            self.count(2 * x.nbytes)
            with watched("tensor.all_reduce", x.nbytes, self.size):
                self._run(dist.all_reduce, x, op=dist.ReduceOp.MAX)
        return x

    def joined(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """All ranks' slices of the last dim, end to end. Shorter ones travel padded."""
        longest = max(lengths)
        padded = x.contiguous() if x.shape[-1] == longest else torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
        parts = [torch.empty_like(padded) for _ in lengths]
        self.count(padded.nbytes * self.size)
        with watched("tensor.all_gather", padded.nbytes * self.size, self.size):
            self._all_gather(parts, padded)
        return torch.cat([part.narrow(-1, 0, length) for part, length in zip(parts, lengths, strict=True)], dim=-1)

    def own(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """This rank's slice of the last dim."""
        return x.narrow(-1, sum(lengths[: self.rank]), lengths[self.rank]).contiguous()

    def all_parts(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' `x`, of equal shapes, end to end in `dim`."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self.count(x.nbytes * self.size)
        with watched("tensor.all_gather", x.nbytes * self.size, self.size):
            self._all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=dim)

    def summed_part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal part in `dim` of the sum of all ranks' `x`."""
        parts = [part.contiguous() for part in x.chunk(self.size, dim=dim)]
        own = torch.empty_like(parts[self.rank])
        self.count(x.nbytes)
        with watched("tensor.reduce_scatter", x.nbytes, self.size):
            self._reduce_scatter(own, parts)
        return own

    def broadcast_(self, x: Tensor) -> None:
        """The first rank's values, on every rank."""
        if self.size > 1:
            self._run(dist.broadcast, x, group_src=0)

    def _all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        self._run(dist.all_gather, parts, own)

    def _reduce_scatter(self, own: Tensor, parts: list[Tensor]) -> None:
        self._run(dist.reduce_scatter, own, parts)

    def _run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.wait_for is None:
            operation(*args, group=self.group, **kwargs)
        else:
            self.wait_for(operation(*args, group=self.group, async_op=True, **kwargs))

    def count(self, nbytes: int) -> None:
        """Add what a collective of `nbytes` on every rank sends, as a ring does."""
        self.num_sent_bytes += nbytes * (self.size - 1) // self.size


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, ranks: TensorGroup) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, ranks: TensorGroup) -> Tensor:
        return ranks.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, ranks: TensorGroup, lengths: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.lengths = ranks, lengths
        return ranks.joined(x, lengths)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.own(grad, ctx.lengths), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, ranks: TensorGroup, lengths: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.lengths = ranks, lengths
        return ranks.own(x, lengths)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.joined(grad, ctx.lengths), None, None


class ColumnOverlapped(torch.autograd.Function):
    """`enter` and the product in one, whose backward computes the weight's gradient while the input's is summed."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: TensorGroup) -> Tensor:
        """x: [..., in]; weight: [own out, in], of which each rank has its rows."""
        ctx.save_for_backward(x, weight)
        ctx.ranks, ctx.has_bias = ranks, bias is not None
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = waiting = None
        if wants_x:
            grad_x = (grad @ weight).contiguous()
            waiting = ctx.ranks.start_sum(grad_x)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        grad_bias = rows.sum(0) if ctx.has_bias and wants_bias else None
        if grad_x is not None and waiting is not None:
            with watched("tensor.all_reduce", grad_x.nbytes, ctx.ranks.size):
                waiting.wait()
        return grad_x, grad_weight, grad_bias, None
