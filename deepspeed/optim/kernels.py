"""The arithmetic of the element-wise optimizers, on lists of tensors, in place.

Called by the optimizers of this folder, which own state and settings. In main memory the compiled loops of
`kernels.native_optimizers` do the work where they can, on GPUs the Triton kernels where they need fewer passes over memory
than torch's; everywhere else torch's fused and foreach kernels.

Conventions: every list has one entry per parameter; entries of one position have the same numel and memory order;
`steps` are 0-dim fp32 tensors on the parameter's device, already counting the step being taken. Gradients count
`grad_factor` times. `lows`, where given, receive the new parameters in their own dtype (None: no copy). On the CPU the
dtypes of one position may differ. Nothing waits for a device.

Invariant: each function gives, within rounding, the update its docstring states, on every device and dtype.
Adam: arXiv:1412.6980, algorithm 1; AdamW: arXiv:1711.05101, algorithm 2; Lion: arXiv:2302.06675, algorithm 2;
Adagrad: Duchi et al., JMLR 12 (2011); LAMB: arXiv:1904.00962, algorithm 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.kernels.native_optimizers import Columns, Decay, Lows, Operation, step_
from deepspeed.kernels.table import pick

Tensors = list[Tensor]


class LambSettings(NamedTuple):
    """A parameter group's settings for LAMB."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    bias_correction: bool
    eps_inside_sqrt: bool

    def shape(self) -> dict[str, Any]:
        """All but the learning rate: what decides the direction of an update."""
        return {name: value for name, value in self._asdict().items() if name != "lr"}


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
    lows: Lows | None = None,
    grad_factor: float = 1.0,
) -> None:
    """One Adam step; all tensors on one device.

    m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2; p -= lr * mhat / (sqrt(vhat) + eps). Weight decay either shrinks p by
    lr * weight_decay first (`decoupled`, AdamW) or is added to g (L2). Without `bias_correction` mhat = m, vhat = v.
    """
    if not params:
        return
    if params[0].device.type == "cpu":
        decay = weight_decay * (float(lr) if decoupled else 1)
        corrections = _inverse_corrections(steps, betas, bias_correction)
        scalars = _adam_scalars(corrections, float(lr), betas, eps, decay, grad_factor)
        columns = Columns(params, grads, exp_avgs, exp_avg_sqs, lows)
        if step_(Operation.ADAM, Decay.of(weight_decay, decoupled), columns, scalars):
            return
    elif not _is_one_pass([params, grads, exp_avgs, exp_avg_sqs], lows, grad_factor):
        triton = pick("adam", params[0].device.type)
        if triton is not None and triton(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled=decoupled, bias_correction=bias_correction, lows=lows, grad_factor=grad_factor,
        ):  # fmt: skip
            return
    with _alike([params, exp_avgs, exp_avg_sqs], grads, grad_factor, lows) as ((params, exp_avgs, exp_avg_sqs), grads):
        if params[0].device.type not in _FUSED_ADAM_DEVICES:
            adam_foreach_(params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps,
                          weight_decay=weight_decay, decoupled=decoupled, bias_correction=bias_correction)  # fmt: skip
            return
        if not bias_correction:
            # b**inf = 0, so the kernel's corrections 1 - b**step are exactly 1.
            steps = [torch.full_like(steps[0], math.inf)] * len(steps)
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, lr=lr, beta1=betas[0], beta2=betas[1],
               weight_decay=weight_decay, eps=eps, maximize=False, grad_scale=None, found_inf=None)  # fmt: skip


def _adam_scalars(
    corrections: Iterable[tuple[float, float]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    grad_factor: float,
) -> list[tuple[float, ...]]:
    """What the compiled kernel takes per tensor."""
    shared = (grad_factor, betas[0], 1 - betas[0], betas[1], 1 - betas[1], decay)
    return [
        # An infinite denominator is a step of size 0.
        (*shared, math.sqrt(of_square) / (lr * of_mean), eps / (lr * of_mean)) if lr else (*shared, 1.0, math.inf)
        for of_mean, of_square in corrections
    ]


def _is_one_pass(columns: Sequence[Tensors], lows: Lows | None, grad_factor: float) -> bool:
    """Whether torch's fused kernel has nothing to convert before or after it."""
    dtypes = {tensor.dtype for tensors in columns for tensor in tensors}
    return len(dtypes) == 1 and grad_factor == 1.0 and all(low is None for low in lows or ())


def _inverse_corrections(
    steps: Tensors, betas: tuple[float, float], bias_correction: bool
) -> list[tuple[float, float]]:
    """1 / (1 - beta**step) for both betas and each step, on the host; ones without `bias_correction`."""
    if not bias_correction:
        return [(1.0, 1.0)] * len(steps)
    known: dict[float, tuple[float, float]] = {}
    for step in (numbers := [step.item() for step in steps]):
        if step not in known:
            mean, square = (1 - beta**step for beta in betas)
            known[step] = (1 / mean if mean else math.inf, 1 / square if square else math.inf)
    return [known[step] for step in numbers]


@contextmanager
def _alike(
    written: Sequence[Tensors], grads: Tensors, grad_factor: float, lows: Lows | None
) -> Iterator[tuple[list[Tensors], Tensors]]:
    """The lists in one dtype, and the gradients times `grad_factor`, for kernels of torch.

    Tensors that are all of one dtype are given as they are; otherwise in the widest of theirs and fp32, and at the end
    the written ones are copied back. Then `lows` receive the first list's.
    """
    dtypes = {tensor.dtype for tensors in (*written, grads) for tensor in tensors}
    wide = dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes, torch.float32)
    inside = [[tensor.to(wide) for tensor in tensors] for tensors in written]
    grads = [grad.to(wide) for grad in grads]
    yield inside, grads if grad_factor == 1.0 else list(torch._foreach_mul(grads, grad_factor))
    for outer, inner in zip(written, inside, strict=True):
        changed = [(to, by) for to, by in zip(outer, inner, strict=True) if to is not by]
        if changed:
            torch._foreach_copy_([to for to, _ in changed], [by for _, by in changed])
    _write_lows(written[0], lows)


def _write_lows(params: Tensors, lows: Lows | None) -> None:
    for low, param in zip(lows or (), params, strict=False):
        if low is not None:
            low.copy_(param)


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


def lamb_moments_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    settings: LambSettings,
    grad_factor: float = 1.0,
) -> tuple[Tensor, Tensors | None]:
    """Advance the moments as Adam does, and propose updates: u = mhat / (sqrt(vhat) + eps) + weight_decay * p.

    Returns [num_params, 2] sums of squares, of p and of u, and the updates for `lamb_apply_`: None where it makes them
    anew, which costs less than to write and read them.
    """
    if not params:
        return torch.zeros(0, 2), None
    if params[0].device.type == "cpu":
        squares = torch.empty(len(params), 2, dtype=torch.float64)
        scalars = _lamb_scalars(steps, settings, grad_factor, [0.0] * len(steps))
        columns = Columns(params, grads, exp_avgs, exp_avg_sqs)
        if step_(Operation.LAMB_MOMENTS, settings.eps_inside_sqrt, columns, scalars, squares):
            return squares.float(), None
    elif (triton := pick("lamb", params[0].device.type)) is not None:
        found = triton.moments(params, grads, exp_avgs, exp_avg_sqs, steps, grad_factor=grad_factor, **settings.shape())
        if found is not None:
            return found, None
    with _alike([exp_avgs, exp_avg_sqs], grads, grad_factor, None) as ((means, squares_of), wide_grads):
        advance_moments_(means, squares_of, wide_grads, settings.betas)
        updates = adam_direction(
            means, squares_of, steps, betas=settings.betas, eps=settings.eps,
            bias_correction=settings.bias_correction, eps_inside_sqrt=settings.eps_inside_sqrt,
        )  # fmt: skip
    if settings.weight_decay:
        torch._foreach_add_(updates, params, alpha=settings.weight_decay)
    norms = [torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)) for tensors in (params, updates)]
    return torch.stack(norms, dim=1).square(), updates


def lamb_apply_(
    params: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    settings: LambSettings,
    updates: Tensors | None,
    ratios: Tensor,
    lows: Lows | None = None,
) -> None:
    """p -= lr * ratio * u, with what `lamb_moments_` returned. `ratios` [num_params]."""
    if updates is None and params[0].device.type != "cpu":
        is_whole = lows is None or all(low is not None for low in lows)
        pick("lamb", params[0].device.type).apply(
            params, exp_avgs, exp_avg_sqs, steps, ratios, lr=settings.lr, lows=lows if is_whole else None, **settings.shape()
        )  # fmt: skip
        if not is_whole:
            _write_lows(params, lows)
        return
    if updates is None:
        rates = [settings.lr * ratio for ratio in ratios.tolist()]
        scalars = _lamb_scalars(steps, settings, 1.0, rates)
        columns = Columns(params, None, exp_avgs, exp_avg_sqs, lows)
        is_done = step_(Operation.LAMB_APPLY, settings.eps_inside_sqrt, columns, scalars)
        assert is_done, "the loops take what they took a moment ago"
        return
    torch._foreach_mul_(updates, list(ratios.unbind()))
    torch._foreach_add_(params, updates, alpha=-settings.lr)
    _write_lows(params, lows)


def _lamb_scalars(
    steps: Tensors, settings: LambSettings, grad_factor: float, rates: Sequence[float]
) -> list[tuple[float, ...]]:
    betas = settings.betas
    shared = (grad_factor, betas[0], 1 - betas[0], betas[1], 1 - betas[1], settings.weight_decay)
    corrections = _inverse_corrections(steps, betas, settings.bias_correction)
    return [(*shared, *pair, settings.eps, rate) for pair, rate in zip(corrections, rates, strict=True)]


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
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    lows: Lows | None = None,
    grad_factor: float = 1.0,
) -> None:
    """c = b1 m + (1-b1) g; p -= lr * (sign(c) + weight_decay * p); m = b2 m + (1-b2) g."""
    if not params:
        return
    if params[0].device.type == "cpu":
        scalars = (grad_factor, betas[0], 1 - betas[0], betas[1], 1 - betas[1], float(lr) * weight_decay, float(lr))
        columns = Columns(params, grads, exp_avgs, None, lows)
        if step_(Operation.LION, Decay.of(weight_decay, True), columns, [scalars] * len(params)):
            return
    elif (triton := pick("lion", params[0].device.type)) is not None and triton(
        params, grads, exp_avgs, lr=lr, betas=betas, weight_decay=weight_decay, lows=lows, grad_factor=grad_factor
    ):
        return
    with _alike([params, exp_avgs], grads, grad_factor, lows) as ((params, exp_avgs), grads):
        direction = torch._foreach_lerp(exp_avgs, grads, 1 - betas[0])
        torch._foreach_sign_(direction)
        if weight_decay:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, direction, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, grads, 1 - betas[1])


def adagrad_(
    params: Tensors,
    grads: Tensors,
    sums: Tensors,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    lows: Lows | None = None,
    grad_factor: float = 1.0,
) -> None:
    """s += g^2; p -= lr * g / (sqrt(s) + eps); weight decay is added to g."""
    if not params:
        return
    if params[0].device.type == "cpu":
        scalars = (grad_factor, weight_decay, float(lr), eps)
        columns = Columns(params, grads, sums, None, lows)
        if step_(Operation.ADAGRAD, weight_decay != 0, columns, [scalars] * len(params)):
            return
    with _alike([params, sums], grads, grad_factor, lows) as ((params, sums), grads):
        if weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
        torch._foreach_addcmul_(sums, grads, grads)
        denominators = torch._foreach_sqrt(sums)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, grads, denominators, value=-lr)


def sgd_(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors | None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    weights: Sequence[float],
    nesterov: bool,
    lows: Lows | None = None,
    grad_factor: float = 1.0,
) -> None:
    """b = momentum * b + weight * g; p -= lr * b, or with `nesterov` lr * (g + momentum * b); p -= lr * g without buffers.

    Weight decay is added to g. `weights[i]` is what of g enters the i-th buffer.
    """
    if not params:
        return
    if params[0].device.type == "cpu":
        scalars = [(grad_factor, weight_decay, float(lr), momentum, weight) for weight in weights]
        variant = 0 if buffers is None else 2 if nesterov else 1
        if step_(Operation.SGD, variant, Columns(params, grads, buffers, None, lows), scalars):
            return
    written = [params, buffers] if buffers is not None else [params]
    with _alike(written, grads, grad_factor, lows) as ((params, *buffers_of), grads):
        if weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
        for moved in buffers_of:
            torch._foreach_mul_(moved, momentum)
            torch._foreach_add_(moved, torch._foreach_mul(grads, list(weights)))
            grads = list(torch._foreach_add(grads, moved, alpha=momentum)) if nesterov else moved
        torch._foreach_add_(params, grads, alpha=-lr)
