"""Two products per expert with an activation between, from tokens to weighed sums, one expert after the other in the cache.

Called by `parallel.expert.hugging_face` for matrices of all experts in main memory. Done apart, gathering tokens, activating,
weighing and adding up each go through memory over all experts' rows; for many small experts that is as long as half of the
products. Here an expert's rows are gathered, multiplied, weighed and added up before the next expert's are looked at, and the
backward does the same the other way round. Kept for it are the tokens and the first products alone: rows are gathered again, what is
behind the activation is computed again, and a weight's gradient needs no results:

    d weight = g . (inner W) = (g W^T) . inner        for a row's gradient g

On one thread in fp32, with the usual activation, all of that is compiled (`native_experts`). Elsewhere, where oneDNN multiplies faster, an expert's rows are filled up with zeros to a number that it has a kernel for (`onednn.room`).

Invariant: the same sums as apart, to rounding, in an order that depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels import native_experts, onednn
from deepspeed.kernels.pages import in_large_pages


class ExpertRows(NamedTuple):
    """One expert's rows among all, [start, stop), and where they are kept, with zeros below them."""

    expert: int
    start: int
    stop: int
    first: int
    room: int

    @property
    def num(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def here(self) -> slice:
        """Among all rows."""
        return slice(self.start, self.stop)

    @property
    def kept(self) -> slice:
        """Among the rows that are kept."""
        return slice(self.first, self.first + self.room)


def rows_of_experts(counts: Sequence[int], fills: bool = False) -> list[ExpertRows]:
    """The experts that have rows; `fills`: with room for as many as oneDNN has a kernel for."""
    found, start, first = [], 0, 0
    for expert, count in enumerate(counts):
        if count:
            found.append(ExpertRows(expert, start, start + count, first, onednn.room(count) if fills else count))
            first += found[-1].room
        start += count
    return found


class Products:
    """How this call multiplies: by oneDNN or by torch, which writes into place."""

    def __init__(self, num_rows: int, up: Tensor, down: Tensor) -> None:
        self.fills = onednn.takes(num_rows // max(1, len(up)), up, down)

    def times(self, left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
        """left @ right, maybe in `scratch`, which has as many rows or more."""
        return onednn.times(left, right) if self.fills else torch.mm(left, right, out=scratch[: len(left)])

    def into(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """The same, written into `into`, which may lie transposed."""
        if not into.is_contiguous():
            into, left, right = into.t(), right.t(), left.t()
        if self.fills:
            into.copy_(onednn.times(left, right))
        else:
            torch.mm(left, right, out=into)


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
        products = Products(len(at), up, down)
        experts = rows_of_experts(counts, products.fills)
        largest = max((part.room for part in experts), default=0)
        before = in_large_pages(tokens.new_empty(sum(part.room for part in experts), up.shape[2]))
        out = tokens.new_zeros(len(tokens), down.shape[2])
        rows, results = tokens.new_empty(largest, tokens.shape[1]), tokens.new_empty(largest, down.shape[2])
        ups, downs = up.unbind(), down.unbind()
        for part in experts:
            mine, kept = at[part.here], before[part.kept]
            products.into(kept, _select(tokens, mine, rows, part), ups[part.expert])
            result = products.times(activation.forward(kept), downs[part.expert], results)[: part.num]
            out.index_add_(0, mine, result.mul_(weights[part.here]))
        ctx.save_for_backward(tokens, weights, up, down, at, before)
        ctx.counts, ctx.activation, ctx.products = counts, activation, products
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of tokens, weights and both matrices; an expert without rows has a gradient of zeros."""
        tokens, weights, up, down, at, before = ctx.saved_tensors
        gradient, counts, products = gradients[0], ctx.counts, ctx.products
        needs_tokens, _, needs_up, needs_down = ctx.needs_input_grad[:4]
        of_tokens = torch.zeros_like(tokens) if needs_tokens else None
        of_weights = torch.empty_like(weights)
        of_up, of_down = (
            in_large_pages(torch.empty_like(matrix)) if needs else None
            for matrix, needs in ((up, needs_up), (down, needs_down))
        )
        experts = rows_of_experts(counts, products.fills)
        largest = max((part.room for part in experts), default=0)
        came, rows = gradient.new_empty(largest, down.shape[2]), tokens.new_empty(largest, tokens.shape[1])
        inners, scales = gradient.new_empty(largest, down.shape[1]), weights.new_empty(largest, 1)
        ups, downs = up.unbind(), down.unbind()
        for part in experts:
            mine, scale = at[part.here], _cleared(scales[: part.room], part)
            scale[: part.num] = weights[part.here]
            g = _select(gradient, mine, came, part)
            of_inner = products.times(g, downs[part.expert].t(), inners)
            inner, gradient_of = ctx.activation.again(before[part.kept])
            torch.sum((of_inner * inner)[: part.num], dim=1, keepdim=True, out=of_weights[part.here])
            of_before = _cleared(gradient_of(of_inner.mul_(scale)), part)
            if of_down is not None:
                products.into(of_down[part.expert], _cleared(inner.mul_(scale), part).t(), g)
            if of_up is not None:
                products.into(of_up[part.expert], _select(tokens, mine, rows, part).t(), of_before)
            if of_tokens is not None:
                of_rows = products.times(of_before, ups[part.expert].t(), rows)[: part.num]
                of_tokens.index_add_(0, mine, of_rows)
        for matrix in (of_up, of_down):
            if matrix is not None:
                for expert in (expert for expert, count in enumerate(counts) if not count):
                    matrix[expert].zero_()
        return of_tokens, of_weights, of_up, of_down, None, None, None


def _select(values: Tensor, at: Tensor, scratch: Tensor, part: ExpertRows) -> Tensor:
    """[room, width] an expert's rows of `values`, and zeros, in `scratch`."""
    torch.index_select(values, 0, at, out=scratch[: part.num])
    return _cleared(scratch[: part.room], part)


def _cleared(rows: Tensor, part: ExpertRows) -> Tensor:
    """The same, with zeros where there is no token: an activation may make anything of zeros."""
    if part.room > part.num:
        rows[part.num :].zero_()
    return rows


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
    if isinstance(activation, GatedSilu) and native_experts.takes(tokens, weights, up, down):
        return native_experts.experts(tokens, at, weights, counts, up, down)
    result: Tensor = ExpertMlp.apply(tokens, weights, up, down, at, list(counts), activation)
    return result
