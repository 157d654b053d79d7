"""Norms and clipping over lists of tensors, for scripts that step by themselves.

With an `mpu` the norm is over the model-parallel ranks' tensors as well; collective there. ZeRO's own norm is
`engine.get_global_grad_norm()`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def get_global_norm(norm_list: Sequence[float]) -> float:
    """The norm of a vector made of vectors with these 2-norms; -1.0 where one of them is not finite or negative."""
    norms = [float(norm) for norm in norm_list]
    return -1.0 if any(not math.isfinite(norm) or norm < 0 for norm in norms) else math.hypot(*norms)


def get_global_norm_of_tensors(
    input_tensors: Iterable[Tensor], norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None
) -> Tensor:
    """The norm of all tensors together, 0-dim fp32, over the model-parallel ranks where `mpu` is given."""
    tensors = [tensor.detach().float() for tensor in input_tensors]
    groups = [mpu.get_model_parallel_group()] if mpu is not None else []
    groups += [moe_ep_group] if moe_ep_group is not None else []
    device = tensors[0].device if tensors else torch.device("cpu")
    if math.isinf(norm_type):
        total = torch.stack(
            [tensor.abs().max() for tensor in tensors if tensor.numel()] or [torch.zeros((), device=device)]
        ).max()
        for group in groups:
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
        return total
    powers = [torch.linalg.vector_norm(tensor, norm_type) ** norm_type for tensor in tensors]
    total = torch.stack(powers or [torch.zeros((), device=device)]).sum()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total ** (1.0 / norm_type)


def clip_tensors_by_global_norm(
    input_tensors: Sequence[Tensor],
    max_norm: float = 1.0,
    global_norm: float | Tensor | None = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> float | Tensor:
    """Scale the tensors in place so that their norm is at most `max_norm`; the norm before."""
    norm = get_global_norm_of_tensors(input_tensors, mpu=mpu) if global_norm is None else global_norm
    factor = max_norm / (float(norm) + eps)
    if factor < 1:
        torch._foreach_mul_(list(input_tensors), factor)
    return norm


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, over the model-parallel ranks where `mpu` is given; the norm before."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [parameter.grad for parameter in given if parameter.grad is not None]
    norm = get_global_norm_of_tensors(grads, norm_type, mpu)
    factor = float(max_norm) / (float(norm) + 1e-6)
    if factor < 1:
        torch._foreach_mul_(grads, factor)
    return norm
