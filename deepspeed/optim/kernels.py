"""The arithmetic of the element-wise optimizers, on lists of tensors, in place.

Called by the optimizers of this folder, which own state and settings; calls torch's fused and foreach kernels. A
faster implementation of one of these functions replaces it here and nothing else changes.

Conventions: every list has one entry per parameter; entries of one position have the same numel and memory order;
moments are fp32, or the parameter's dtype; `steps` are 0-dim fp32 tensors on the parameter's device, already counting
the step being taken. Nothing waits for the device.

Invariant: each function gives, within rounding, the update its docstring states, on every device and dtype.
Adam: arXiv:1412.6980, algorithm 1; AdamW: arXiv:1711.05101, algorithm 2; Lion: arXiv:2302.06675, algorithm 2;
Adagrad: Duchi et al., JMLR 12 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]

_FUSED_ADAM_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Device types for which torch has its fused Adam; elsewhere the foreach kernels run."""

_ONE = torch.ones(())
"""Added by tensor: a Python number would be wrapped anew for every entry of a list on the CPU."""


def count_steps_(steps: Tensors) -> None:
    """Add one to each counter."""
    if steps[0].device.type == "cpu":
        torch._foreach_add_(steps, _ONE, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1.0)


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    """One Adam step; all tensors on one device, parameters of one dtype.

    m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2; p -= lr * mhat / (sqrt(vhat) + eps). Weight decay either shrinks p by
    lr * weight_decay first (`decoupled`, AdamW) or is added to g (L2). Without `bias_correction` mhat = m, vhat = v.
    """
    if params[0].dtype != exp_avgs[0].dtype:
        wide = _as_dtype_of(params, exp_avgs)
        adam_(wide, _as_dtype_of(grads, exp_avgs), exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps,
              weight_decay=weight_decay, decoupled=decoupled, bias_correction=bias_correction)  # fmt: skip
        torch._foreach_copy_(params, wide)
        return
    if params[0].device.type in _FUSED_ADAM_DEVICES:
        if not bias_correction:
            # b**inf = 0, so the kernel's corrections 1 - b**step are exactly 1.
            steps = [torch.full_like(steps[0], math.inf)] * len(steps)
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, lr=lr, beta1=betas[0], beta2=betas[1],
               weight_decay=weight_decay, eps=eps, maximize=False, grad_scale=None, found_inf=None)  # fmt: skip
        return
    adam_foreach_(params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps,
                  weight_decay=weight_decay, decoupled=decoupled, bias_correction=bias_correction)  # fmt: skip


def adam_foreach_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    """`adam_` without a fused kernel, for devices that have none."""
    if weight_decay and decoupled:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    elif weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    advance_moments_(exp_avgs, exp_avg_sqs, grads, betas)
    update = adam_direction(exp_avgs, exp_avg_sqs, steps, betas=betas, eps=eps, bias_correction=bias_correction)
    torch._foreach_mul_(update, lr)
    torch._foreach_sub_(params, update)


def advance_moments_(exp_avgs: Tensors, exp_avg_sqs: Tensors, grads: Tensors, betas: tuple[float, float]) -> None:
    """m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2."""
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])


def adam_direction(
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    eps_inside_sqrt: bool = False,
) -> Tensors:
    """mhat / (sqrt(vhat) + eps), or mhat / sqrt(vhat + eps), in new tensors."""
    denominators = list(exp_avg_sqs)
    if bias_correction:
        denominators = list(torch._foreach_div(denominators, _corrections(steps, betas[1])))
    if eps_inside_sqrt:
        denominators = list(torch._foreach_sqrt(torch._foreach_add(denominators, eps)))
    else:
        denominators = list(torch._foreach_add(torch._foreach_sqrt(denominators), eps))
    direction = list(torch._foreach_div(exp_avgs, denominators))
    if bias_correction:
        torch._foreach_div_(direction, _corrections(steps, betas[0]))
    return direction


def _corrections(steps: Tensors, beta: float) -> Tensors:
    """1 - beta**step for each step. By expm1: the plain form loses four digits in fp32 where beta is near 1."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return list(torch.stack(steps).mul_(log_beta).expm1_().neg_().unbind())


def undo_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    """Invert the `adam_` step that was just taken with `grad`, within rounding, and its count."""
    wide = param.to(exp_avg.dtype)
    (direction,) = adam_direction(
        [exp_avg], [exp_avg_sq], [step], betas=betas, eps=eps, bias_correction=bias_correction
    )
    wide = wide + lr * direction
    wide = wide / (1 - lr * weight_decay) if decoupled else wide
    grad = grad.to(exp_avg.dtype)
    grad = grad if decoupled else grad + weight_decay * wide
    exp_avg.sub_(grad, alpha=1 - betas[0]).div_(betas[0])
    exp_avg_sq.addcmul_(grad, grad, value=betas[1] - 1).div_(betas[1]).clamp_(min=0)
    step.sub_(1)
    param.copy_(wide)


def lion_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """c = b1 m + (1-b1) g; p -= lr * (sign(c) + weight_decay * p); m = b2 m + (1-b2) g."""
    grads = _as_dtype_of(grads, exp_avgs)
    direction = torch._foreach_lerp(exp_avgs, grads, 1 - betas[0])
    torch._foreach_sign_(direction)
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, direction, alpha=-lr)
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[1])


def adagrad_(params: Tensors, grads: Tensors, sums: Tensors, *, lr: float, eps: float, weight_decay: float) -> None:
    """s += g^2; p -= lr * g / (sqrt(s) + eps); weight decay is added to g."""
    grads = _as_dtype_of(grads, sums)
    if weight_decay:
        grads = list(torch._foreach_add(grads, _as_dtype_of(params, sums), alpha=weight_decay))
    torch._foreach_addcmul_(sums, grads, grads)
    denominators = torch._foreach_sqrt(sums)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, grads, denominators, value=-lr)


def _as_dtype_of(tensors: Sequence[Tensor], models: Sequence[Tensor]) -> Tensors:
    return [tensor.to(model.dtype) for tensor, model in zip(tensors, models, strict=True)]
