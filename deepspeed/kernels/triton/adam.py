"""Adam and AdamW over lists of tensors in one launch, any mix of fp32, bf16 and fp16; see `optim.kernels.adam_`.

One pass over memory: gradient in its own dtype, loss scale and clipping as one factor, moments, parameter, and the
low-precision parameter that ZeRO publishes. arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deepspeed.kernels.triton.lists import BLOCK, CHUNK, DTYPES, Column, TableCache, corrections, narrow, takes

NO_DECAY, DECOUPLED, L2 = 0, 1, 2


@triton.jit
def adam_kernel(
    addresses,  # [4 or 5, num_tensors] int64: parameters, gradients, means, squares, low-precision parameters
    numels,  # [num_tensors] int64
    owners,  # [num_chunks] int64
    starts,  # [num_chunks] int64
    corrections,  # [num_tensors, 2] fp32
    num_tensors,
    grad_factor,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decay: tl.constexpr,
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
    squares = tl.load(addresses + 3 * num_tensors + owner).to(tl.pointer_type(state_type))
    of_mean = tl.load(corrections + 2 * owner)
    of_square = tl.load(corrections + 2 * owner + 1)
    for offset in range(0, chunk_numel, block):
        at = start + offset + tl.arange(0, block)
        here = at < numel
        param = tl.load(params + at, mask=here, other=0).to(tl.float32)
        grad = tl.load(grads + at, mask=here, other=0).to(tl.float32) * grad_factor
        mean = tl.load(means + at, mask=here, other=0).to(tl.float32)
        square = tl.load(squares + at, mask=here, other=0).to(tl.float32)
        if decay == 1:
            param = param * (1 - lr * weight_decay)
        if decay == 2:
            grad = grad + weight_decay * param
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad * grad
        param = param - lr * (mean * of_mean) / (tl.sqrt_rn(square * of_square) + eps)
        tl.store(params + at, narrow(param, param_type), mask=here)
        tl.store(means + at, narrow(mean, state_type), mask=here)
        tl.store(squares + at, narrow(square, state_type), mask=here)
        if has_low:
            lows = tl.load(addresses + 4 * num_tensors + owner).to(tl.pointer_type(low_type))
            tl.store(lows + at, narrow(param, low_type), mask=here)


class TritonAdam:
    """The kernel with its tables; one per process and device is enough."""

    def __init__(self) -> None:
        self._tables = TableCache()

    def __call__(
        self,
        params: Column,
        grads: Column,
        exp_avgs: Column,
        exp_avg_sqs: Column,
        steps: Column,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled: bool,
        bias_correction: bool,
        lows: Sequence[Tensor | None] | None = None,
        grad_factor: float = 1.0,
    ) -> bool:
        """One step in place; False, with nothing changed, where the kernel does not take these tensors."""
        wanted = [low for low in lows or () if low is not None]
        if (
            isinstance(lr, Tensor)
            or len(wanted) not in (0, len(params))
            or exp_avgs[0].dtype is not exp_avg_sqs[0].dtype
        ):
            return False
        columns = [params, grads, exp_avgs, exp_avg_sqs, *([wanted] if wanted else [])]
        if not takes(columns):
            return False
        table = self._tables.table(columns)
        if table.num_chunks:
            adam_kernel[(table.num_chunks,)](
                *table[:4], corrections(steps, betas, bias_correction), len(params),
                grad_factor, lr, betas[0], betas[1], eps, weight_decay,
                decay=(DECOUPLED if decoupled else L2) if weight_decay else NO_DECAY,
                param_type=DTYPES[params[0].dtype], grad_type=DTYPES[grads[0].dtype],
                state_type=DTYPES[exp_avgs[0].dtype], low_type=DTYPES[(wanted or params)[0].dtype],
                has_low=bool(wanted), chunk_numel=CHUNK, block=BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        return True
