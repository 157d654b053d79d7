"""Lion over lists of tensors in one launch; see `optim.kernels.lion_`. arXiv:2302.06675, algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.triton.lists import BLOCK, CHUNK, DTYPES, Column, TableCache, narrow, takes


@triton.jit
def lion_kernel(
    addresses,  # [3 or 4, num_tensors] int64: parameters, gradients, means, low-precision parameters
    numels,
    owners,
    starts,
    num_tensors,
    grad_factor,
    lr,
    beta1,
    beta2,
    weight_decay,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
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
    grads = tl.load(addresses + num_tensors + owner).to(tl.pointer_type(grad_type))
    means = tl.load(addresses + 2 * num_tensors + owner).to(tl.pointer_type(state_type))
    for offset in range(0, chunk_numel, block):
        at = start + offset + tl.arange(0, block)
        here = at < numel
        param = tl.load(params + at, mask=here, other=0).to(tl.float32)
        grad = tl.load(grads + at, mask=here, other=0).to(tl.float32) * grad_factor
        mean = tl.load(means + at, mask=here, other=0).to(tl.float32)
        mixed = beta1 * mean + (1 - beta1) * grad
        sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, mixed))  # 0 stays 0, NaN stays NaN
        param = param * (1 - lr * weight_decay) - lr * sign
        tl.store(params + at, narrow(param, param_type), mask=here)
        tl.store(means + at, narrow(beta2 * mean + (1 - beta2) * grad, state_type), mask=here)
        if has_low:
            lows = tl.load(addresses + 3 * num_tensors + owner).to(tl.pointer_type(low_type))
            tl.store(lows + at, narrow(param, low_type), mask=here)


class TritonLion:
    """The kernel with its tables."""

    def __init__(self) -> None:
        self._tables = TableCache()

    def __call__(
        self,
        params: Column,
        grads: Column,
        exp_avgs: Column,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        lows: Sequence[Tensor | None] | None = None,
        grad_factor: float = 1.0,
    ) -> bool:
        """One step in place; False, with nothing changed, where the kernel does not take these tensors."""
        wanted = [low for low in lows or () if low is not None]
        columns = [params, grads, exp_avgs, *([wanted] if wanted else [])]
        if isinstance(lr, Tensor) or len(wanted) not in (0, len(params)) or not takes(columns):
            return False
        table = self._tables.table(columns)
        if table.num_chunks:
            lion_kernel[(table.num_chunks,)](
                *table[:4], len(params), grad_factor, lr, betas[0], betas[1], weight_decay,
                param_type=DTYPES[params[0].dtype], grad_type=DTYPES[grads[0].dtype],
                state_type=DTYPES[exp_avgs[0].dtype], low_type=DTYPES[(wanted or params)[0].dtype],
                has_low=bool(wanted), chunk_numel=CHUNK, block=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        return True
