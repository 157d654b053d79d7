"""Two products per expert with an activation between, from tokens to weighed sums, one expert after the other in the cache.

Called by `parallel.expert.hugging_face` for matrices of all experts in main memory. Done apart, gathering tokens, activating,
weighing and adding up each go through memory over all experts' rows; for many small experts that is as long as half of the
products. Here an expert's rows are gathered, multiplied, weighed and added up before the next expert's are looked at, and the
backward does the same the other way round. Kept for it are the tokens and the first products alone: rows are gathered again, what is
behind the activation is computed again, and a weight's gradient needs no results:

    d weight = g . (inner W) = (g W^T) . inner        for a row's gradient g

Invariant: the same sums as apart, to rounding, in an order that depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels.pages import in_large_pages


class Part(NamedTuple):
    """One expert's rows among all, [start, stop)."""

    expert: int
    start: int
    stop: int

    @property
    def num(self) -> int:
        """How many."""
        return self.stop - self.start


def parts(counts: Sequence[int]) -> Iterator[Part]:
    """The experts that have rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield Part(expert, start, start + count)
        start += count


class Activation(Protocol):
    """Between the two products: from [m, a] to [m, b], each row by itself, without parameters."""

    def forward(self, before: Tensor) -> Tensor:
        """[m, a] to [m, b]."""
        ...

    def again(self, before: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same, and what makes a gradient [m, a] of one [m, b], which may be overwritten."""
        ...


class AnyActivation:
    """A function that autograd differentiates."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.forward = function

    def again(self, before: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See Activation."""
        with torch.enable_grad():
            leaf = before.detach().requires_grad_()
            inner = self.forward(leaf)
        return inner.detach(), lambda gradient: torch.autograd.grad(inner, leaf, gradient)[0]


class GatedSilu:
    """silu(first half) * second half, whose gradient is written in place: autograd would join two halves."""

    def forward(self, before: Tensor) -> Tensor:
        """See Activation."""
        gate, value = before.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    def again(self, before: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """See Activation."""
        gate, value = before.chunk(2, dim=-1)
        opened = F.silu(gate)

        def gradient_of(gradient: Tensor) -> Tensor:
            into = torch.empty_like(before)
            of_gate, of_value = into.chunk(2, dim=-1)
            torch.mul(gradient, opened, out=of_value)
            torch.ops.aten.silu_backward.grad_input(gradient.mul_(value), gate, grad_input=of_gate)
            return into

        return opened * value, gradient_of


class ExpertMlp(torch.autograd.Function):
    """See the module's text, and `expert_mlp`."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        at: Tensor,
        counts: Sequence[int],
        activation: Activation,
    ) -> Tensor:
        """See `expert_mlp`."""
        before = in_large_pages(tokens.new_empty(len(at), up.shape[2]))
        out = tokens.new_zeros(len(tokens), down.shape[2])
        largest = max(counts, default=0)
        rows, results = tokens.new_empty(largest, tokens.shape[1]), tokens.new_empty(largest, down.shape[2])
        ups, downs = up.unbind(), down.unbind()
        for part in parts(counts):
            here = slice(part.start, part.stop)
            torch.index_select(tokens, 0, at[here], out=rows[: part.num])
            torch.mm(rows[: part.num], ups[part.expert], out=before[here])
            result = torch.mm(activation.forward(before[here]), downs[part.expert], out=results[: part.num])
            out.index_add_(0, at[here], result.mul_(weights[here]))
        ctx.save_for_backward(tokens, weights, up, down, at, before)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of tokens, weights and both matrices; an expert without rows has a gradient of zeros."""
        tokens, weights, up, down, at, before = ctx.saved_tensors
        gradient, counts = gradients[0], ctx.counts
        needs_tokens, _, needs_up, needs_down = ctx.needs_input_grad[:4]
        of_tokens = torch.zeros_like(tokens) if needs_tokens else None
        of_weights = torch.empty_like(weights)
        of_up, of_down = (
            in_large_pages(torch.empty_like(matrix)) if needs else None
            for matrix, needs in ((up, needs_up), (down, needs_down))
        )
        largest = max(counts, default=0)
        came, rows = gradient.new_empty(largest, down.shape[2]), tokens.new_empty(largest, tokens.shape[1])
        inners = gradient.new_empty(largest, down.shape[1])
        ups, downs = up.unbind(), down.unbind()
        for part in parts(counts):
            here = slice(part.start, part.stop)
            g = torch.index_select(gradient, 0, at[here], out=came[: part.num])
            of_inner = torch.mm(g, downs[part.expert].t(), out=inners[: part.num])
            inner, gradient_of = ctx.activation.again(before[here])
            torch.sum(of_inner * inner, dim=1, keepdim=True, out=of_weights[here])
            of_before = gradient_of(of_inner.mul_(weights[here]))
            if of_down is not None:
                _product_into(of_down[part.expert], inner.mul_(weights[here]), g)
            if of_up is not None:
                _product_into(of_up[part.expert], _select(tokens, at[here], rows), of_before)
            if of_tokens is not None:
                of_tokens.index_add_(0, at[here], torch.mm(of_before, ups[part.expert].t(), out=rows[: part.num]))
        for matrix in (of_up, of_down):
            if matrix is not None:
                for expert in (expert for expert, count in enumerate(counts) if not count):
                    matrix[expert].zero_()
        return of_tokens, of_weights, of_up, of_down, None, None, None


def _select(tokens: Tensor, at: Tensor, into: Tensor) -> Tensor:
    return torch.index_select(tokens, 0, at, out=into[: len(at)])


def _product_into(into: Tensor, left: Tensor, right: Tensor) -> None:
    """left^T right, where `into` may lie transposed."""
    if into.is_contiguous():
        torch.mm(left.t(), right, out=into)
    else:
        torch.mm(right.t(), left, out=into.t())


def takes(tokens: Tensor, weights: Tensor) -> bool:
    """Whether these are in main memory, and wide enough for sums that are rounded once."""
    wide = (torch.float32, torch.float64)
    return tokens.device.type == "cpu" and tokens.dtype in wide and weights.dtype == tokens.dtype


def expert_mlp(
    tokens: Tensor,
    at: Tensor,
    weights: Tensor,
    counts: Sequence[int],
    up: Tensor,
    down: Tensor,
    activation: Activation,
) -> Tensor:
    """[s, out]: at each token the sum of what its experts give, weighed.

    tokens [s, width]; at [n] the token of each row, sorted by expert, `counts[e]` rows for expert e; weights [n, 1]; up
    [experts, width, a], down [experts, b, out], matrices that lie transposed handed in so. All of one dtype.
    """
    result: Tensor = ExpertMlp.apply(tokens, weights, up, down, at, list(counts), activation)
    return result
