"""Experts with gated MLPs, compiled: what `expert_mlp` computes, forward and backward, one expert after the other.

Asked by `expert_mlp`, on one thread and in fp32. BLAS libraries lay both operands of a product out anew, for which an expert's few rows do not
pay; here tokens are laid out once, as they are gathered, products follow each other in that form, and the gradients of weights
are written where they belong (csrc/experts.inl, which tells more). Two operations are registered with torch, so
that what watches a step sees them: deepspeed::experts and deepspeed::experts_backward.

Invariant: an output depends on its operands alone, in one order: the same bits on every call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from deepspeed.kernels import native, onednn
from deepspeed.kernels.reused_memory import REUSED

MULTIPLE = 16
"""Of which widths have to be multiples: a register's floats."""


def takes(tokens: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether `experts` computes these: plain fp32 in main memory, [experts, out, in] in one piece, and one thread to do it."""
    if isinstance(tokens, FakeTensor):  # counts have no values there, on which what is kept for the backward depends
        return False
    if torch.get_num_threads() != 1 or not all(map(onednn.is_plain, (tokens, weights, up, down))):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    inner, width = down.shape[1], tokens.shape[1]
    fits = up.shape[1:] == (width, 2 * inner) and down.shape[2] == width and inner % MULTIPLE == width % MULTIPLE == 0
    lies = all(matrix.transpose(1, 2).is_contiguous() for matrix in (up, down))
    return fits and lies and native.isas()[:1] not in ([], ["portable"])


def experts(tokens: Tensor, at: Tensor, weights: Tensor, counts: Sequence[int], up: Tensor, down: Tensor) -> Tensor:
    """See `expert_mlp.expert_mlp`, with silu(first half) * second half between the products. `takes` must hold."""
    matrices = up.transpose(1, 2), down.transpose(1, 2)
    result: Tensor = Experts.apply(tokens, at, weights, torch.tensor(counts), *matrices)
    return result


class Experts(torch.autograd.Function):
    """(tokens [s, width], at [n], weights [n, 1], counts [experts], up [experts, 2 * inner, width], down [experts, width, inner]) ->
    [s, width]."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        """Keeps first products."""
        out, before = torch.ops.deepspeed.experts(*given)
        ctx.save_for_backward(*given, before)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of tokens, weights and both matrices; an expert without rows has a gradient of zeros."""
        if torch.is_grad_enabled():  # a gradient of the gradient may be wanted
            return _backward_on_torch(gradients[0], ctx.saved_tensors[:6], ctx.needs_input_grad)
        needs = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
        of_tokens, of_weights, *of_matrices = torch.ops.deepspeed.experts_backward(
            gradients[0], *ctx.saved_tensors, needs
        )
        of_tokens, of_up, of_down = (
            value if is_needed else None for value, is_needed in zip((of_tokens, *of_matrices), needs, strict=True)
        )
        return of_tokens, None, of_weights, None, of_up, of_down


def _backward_on_torch(gradient: Tensor, given: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    tokens, at, weights, counts, up, down = given
    out = torch.zeros_like(tokens)
    shares = (rows.split(counts.tolist()) for rows in (at, weights))
    for mine, factors, into, back in zip(*shares, up, down, strict=True):
        gate, value = functional.linear(tokens[mine], into).chunk(2, dim=-1)
        out = out.index_add(0, mine, functional.linear(functional.silu(gate) * value, back) * factors)
    wanted = [tensor for tensor, is_needed in zip(given, needs, strict=True) if is_needed]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needs)


def _forward(
    tokens: Tensor, at: Tensor, weights: Tensor, counts: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    library = _library()
    rows = sum(library.ds_experts_room(ctypes.c_int64(count)) for count in counts.tolist())
    before = REUSED.empty((rows, up.shape[1]), up.dtype)
    out = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
    kept = tokens.contiguous(), at.contiguous(), weights.contiguous()
    library.ds_experts_forward(*map(_address, (*kept, counts)), *_sizes(down), *map(_address, (up, down, before, out)))
    return out, before


def _backward(
    gradient: Tensor,
    tokens: Tensor,
    at: Tensor,
    weights: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    before: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    of_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format) if needs[0] else None
    of_matrices = [
        REUSED.empty(x.shape, x.dtype) if needed else None for x, needed in zip((up, down), needs[1:], strict=True)
    ]
    kept = tokens.contiguous(), gradient.contiguous(), at.contiguous(), weights.contiguous()
    _library().ds_experts_backward(
        *map(_address, (*kept, counts)),
        *_sizes(down),
        *map(_address, (up, down, before, of_tokens, of_weights, *of_matrices)),
    )
    of_tokens, of_up, of_down = (tokens.new_empty(0) if value is None else value for value in (of_tokens, *of_matrices))
    return of_tokens, of_weights, of_up, of_down


def _library() -> Any:
    library = native.library()
    assert library is not None, "takes() says whether there is a library"
    library.ds_experts_room.restype = ctypes.c_int64
    return library


def _sizes(down: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in down.shape]


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_OPERATIONS = torch.library.Library("deepspeed", "DEF")
_GIVEN = "Tensor tokens, Tensor at, Tensor weights, Tensor counts, Tensor up, Tensor down"
_OPERATIONS.define(f"experts({_GIVEN}) -> (Tensor, Tensor)")
_OPERATIONS.define(
    f"experts_backward(Tensor gradient, {_GIVEN}, Tensor before, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
_OPERATIONS.impl("experts", _forward, "CPU")
_OPERATIONS.impl("experts_backward", _backward, "CPU")
