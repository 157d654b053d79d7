"""LAMB over lists of tensors in three launches; see `optim.kernels.lamb_moments_` and `lamb_apply_`.

    moments    advances means and squares; each chunk leaves its sums of squares of parameter and update
    sums       adds up a tensor's chunks in order, so that a norm does not depend on which program came first
    apply      makes the updates anew, which costs less than to write and read them, and steps

After arXiv:1904.00962, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.triton.lists import BLOCK, CHUNK, DTYPES, Column, Table, TableCache, corrections, narrow, takes


@triton.jit
def _update(param, mean, square, of_mean, of_square, eps, weight_decay, eps_inside: tl.constexpr):
    """mhat / (sqrt(vhat) + eps) + weight_decay p."""
    if eps_inside:
        below = tl.sqrt_rn(square * of_square + eps)
    else:
        below = tl.sqrt_rn(square * of_square) + eps
    return mean * of_mean / below + weight_decay * param


@triton.jit
def moments_kernel(
    addresses,  # [4, num_tensors] int64: parameters, gradients, means, squares
    numels,
    owners,
    starts,
    corrections,  # [num_tensors, 2] fp32
    sums,  # [num_chunks, 2] fp32, written
    num_tensors,
    grad_factor,
    beta1,
    beta2,
    eps,
    weight_decay,
    eps_inside: tl.constexpr,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    state_type: tl.constexpr,
    chunk_numel: tl.constexpr,
    block: tl.constexpr,
):
    """One chunk of one tensor."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(starts + chunk)
    numel = tl.load(numels + owner)
    params = tl.load(addresses + owner).to(tl.pointer_type(param_type))
    grads = tl.load(addresses + num_tensors + owner).to(tl.pointer_type(grad_type))
    means = tl.load(addresses + 2 * num_tensors + owner).to(tl.pointer_type(state_type))
    squares = tl.load(addresses + 3 * num_tensors + owner).to(tl.pointer_type(state_type))
    of_mean = tl.load(corrections + 2 * owner)
    of_square = tl.load(corrections + 2 * owner + 1)
    of_params = tl.zeros((block,), dtype=tl.float32)
    of_updates = tl.zeros((block,), dtype=tl.float32)
    for offset in range(0, chunk_numel, block):
        at = start + offset + tl.arange(0, block)
        here = at < numel
        param = tl.load(params + at, mask=here, other=0).to(tl.float32)
        grad = tl.load(grads + at, mask=here, other=0).to(tl.float32) * grad_factor
        mean = beta1 * tl.load(means + at, mask=here, other=0).to(tl.float32) + (1 - beta1) * grad
        square = beta2 * tl.load(squares + at, mask=here, other=0).to(tl.float32) + (1 - beta2) * grad * grad
        tl.store(means + at, narrow(mean, state_type), mask=here)
        tl.store(squares + at, narrow(square, state_type), mask=here)
        # As the apply kernel will read them, so that the norm is that of the update taken.
        mean = narrow(mean, state_type).to(tl.float32)
        square = narrow(square, state_type).to(tl.float32)
        update = _update(param, mean, square, of_mean, of_square, eps, weight_decay, eps_inside)
        of_params += param * param
        of_updates += tl.where(here, update * update, 0.0)
    tl.store(sums + 2 * chunk, tl.sum(of_params, axis=0))
    tl.store(sums + 2 * chunk + 1, tl.sum(of_updates, axis=0))


@triton.jit
def sums_kernel(
    sums,  # [num_chunks, 2] fp32
    firsts,  # [num_tensors + 1] int64
    out,  # [num_tensors, 2] fp32, written
    block: tl.constexpr,
):
    """One tensor: adds up its chunks."""
    owner = tl.program_id(0)
    first = tl.load(firsts + owner)
    last = tl.load(firsts + owner + 1)
    for part in tl.static_range(2):
        total = tl.zeros((block,), dtype=tl.float32)
        for offset in range(first, last, block):
            at = offset + tl.arange(0, block)
            total += tl.load(sums + 2 * at + part, mask=at < last, other=0)
        tl.store(out + 2 * owner + part, tl.sum(total, axis=0))


@triton.jit
def apply_kernel(
    addresses,  # [3 or 4, num_tensors] int64: parameters, means, squares, low-precision parameters
    numels,
    owners,
    starts,
    corrections,  # [num_tensors, 2] fp32
    ratios,  # [num_tensors] fp32
    num_tensors,
    lr,
    eps,
    weight_decay,
    eps_inside: tl.constexpr,
    param_type: tl.constexpr,
    state_type: tl.constexpr,
    low_type: tl.constexpr,
    has_low: tl.constexpr,
    chunk_numel: tl.constexpr,
    block: tl.constexpr,
):
    """One chunk of one tensor."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start = tl.load(starts + chunk)
    numel = tl.load(numels + owner)
    params = tl.load(addresses + owner).to(tl.pointer_type(param_type))
    means = tl.load(addresses + num_tensors + owner).to(tl.pointer_type(state_type))
    squares = tl.load(addresses + 2 * num_tensors + owner).to(tl.pointer_type(state_type))
    of_mean = tl.load(corrections + 2 * owner)
    of_square = tl.load(corrections + 2 * owner + 1)
    rate = lr * tl.load(ratios + owner)
    for offset in range(0, chunk_numel, block):
        at = start + offset + tl.arange(0, block)
        here = at < numel
        param = tl.load(params + at, mask=here, other=0).to(tl.float32)
        mean = tl.load(means + at, mask=here, other=0).to(tl.float32)
        square = tl.load(squares + at, mask=here, other=0).to(tl.float32)
        param = param - rate * _update(param, mean, square, of_mean, of_square, eps, weight_decay, eps_inside)
        tl.store(params + at, narrow(param, param_type), mask=here)
        if has_low:
            lows = tl.load(addresses + 3 * num_tensors + owner).to(tl.pointer_type(low_type))
            tl.store(lows + at, narrow(param, low_type), mask=here)


class TritonLamb:
    """The kernels with their tables."""

    def __init__(self) -> None:
        self._tables = TableCache()

    def moments(
        self,
        params: Column,
        grads: Column,
        exp_avgs: Column,
        exp_avg_sqs: Column,
        steps: Column,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        eps_inside_sqrt: bool,
        grad_factor: float = 1.0,
    ) -> Tensor | None:
        """Advance the moments; [num_tensors, 2] sums of squares of parameters and updates. None, with nothing changed,
        where the kernels do not take these tensors."""
        columns = [params, grads, exp_avgs, exp_avg_sqs]
        if exp_avgs[0].dtype is not exp_avg_sqs[0].dtype or not takes(columns):
            return None
        table = self._tables.table(columns)
        sums = torch.empty(table.num_chunks, 2, device=params[0].device)
        if table.num_chunks:
            moments_kernel[(table.num_chunks,)](
                *table[:4], corrections(steps, betas, bias_correction), sums, len(params),
                grad_factor, betas[0], betas[1], eps, weight_decay, eps_inside=eps_inside_sqrt,
                param_type=DTYPES[params[0].dtype], grad_type=DTYPES[grads[0].dtype],
                state_type=DTYPES[exp_avgs[0].dtype], chunk_numel=CHUNK, block=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        return _add_up(sums, table)

    def apply(
        self,
        params: Column,
        exp_avgs: Column,
        exp_avg_sqs: Column,
        steps: Column,
        ratios: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        eps_inside_sqrt: bool,
        lows: Sequence[Tensor | None] | None = None,
    ) -> None:
        """p -= lr * ratio * u, for tensors whose `moments` were taken a moment ago. `lows` all tensors, or none."""
        wanted = [low for low in lows or () if low is not None]
        table = self._tables.table([params, exp_avgs, exp_avg_sqs, *([wanted] if wanted else [])])
        if table.num_chunks:
            apply_kernel[(table.num_chunks,)](
                *table[:4], corrections(steps, betas, bias_correction), ratios.float().contiguous(), len(params),
                lr, eps, weight_decay, eps_inside=eps_inside_sqrt,
                param_type=DTYPES[params[0].dtype], state_type=DTYPES[exp_avgs[0].dtype],
                low_type=DTYPES[(wanted or params)[0].dtype], has_low=bool(wanted), chunk_numel=CHUNK, block=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip


def _add_up(sums: Tensor, table: Table) -> Tensor:
    out = torch.empty(len(table.numels), 2, device=sums.device)
    sums_kernel[(len(table.numels),)](sums, table.firsts, out, block=128, enable_fp_fusion=False)
    return out
