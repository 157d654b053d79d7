"""Means of many tensors at once, each rank getting its part: `deepspeed.runtime.comm.coalesced_collectives`.

For scripts and libraries that call them by the original's names; ZeRO itself moves flat buckets (`comm.exchange`).

    rank r's part of a tensor of n elements   [r c, min((r + 1) c, n)), c = ceil(n / ranks): the last ones shorter, or empty

Invariant: every rank calls with tensors of the same sizes in the same order. The source of the names, and of what is not
quantised, is the public contract of the original; of the arithmetic `comm.quantized_exchanges`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.choose import make_exchange
from deepspeed.comm.exchange import Exchange
from deepspeed.comm.feedback import ErrorFeedback
from deepspeed.comm.quantized_exchanges import Hops, QuantizedReduction
from deepspeed.utils.errors import DeepSpeedError


def reduce_scatter_coalesced(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """This rank's part of each tensor's mean over the group, 1-D. Collective.

    Raises DeepSpeedError for what is no list of floating-point tensors.
    """
    _check("reduce_scatter_coalesced", tensors)
    if not tensors:
        return []
    exchange = make_exchange(group, tensors[0].device)
    if exchange.world_size == 1:
        return [tensor.reshape(-1).clone() for tensor in tensors]
    parts: list[Tensor | None] = [None] * len(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # one message for each dtype
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        found = _parts_of([tensors[i] for i in chosen], exchange)
        for i, part in zip(chosen, found, strict=True):
            parts[i] = part
    return [part for part in parts if part is not None]


def _parts_of(tensors: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """Of tensors of one dtype: every rank's parts lie together in one flat buffer."""
    ranks = exchange.world_size
    shares = [-(-tensor.numel() // ranks) for tensor in tensors]
    flat = tensors[0].new_zeros(ranks, sum(shares))
    at = 0
    for tensor, share in zip(tensors, shares, strict=True):
        padded = tensor.new_zeros(ranks * share)
        padded[: tensor.numel()].copy_(tensor.detach().reshape(-1))
        flat[:, at : at + share] = padded.view(ranks, share)
        at += share
    mine = torch.empty(sum(shares), dtype=flat.dtype, device=flat.device)
    exchange.start_reduce_scatter(flat.view(-1), mine, divide_by=ranks, accumulate=False).wait()
    pieces = mine.split(shares)
    return [
        piece[: max(0, min(share, tensor.numel() - exchange.rank * share))]
        for piece, share, tensor in zip(pieces, shares, tensors, strict=True)
    ]


def all_to_all_quant_reduce(tensors: Sequence[Tensor], groups: Mapping[str, Any]) -> list[Tensor]:
    """The same over all ranks, by int4 in two hops: `groups["local_<node>"]` within a node, `groups["global_<i>"]` over them.

    Vectors, and tensors whose elements do not divide by twice the ranks, are reduced in full. Collective. What is not finite in a
    tensor makes its group of 128 so in the mean. Raises as `reduce_scatter_coalesced`, and for groups that do not fit.
    """
    _check("all_to_all_quant_reduce", tensors)
    hops, exchange = _hops(groups, tensors)
    return [
        _quantized(tensor, QuantizedReduction(exchange, hops)) if _goes(tensor, exchange.world_size) else part
        for tensor, part in zip(tensors, _in_full(tensors, exchange), strict=True)
    ]


def all_to_all_loco_quant_reduce(
    params: Sequence[Any], groups: Mapping[str, Any], loco_param: Mapping[str, Any]
) -> list[Tensor]:
    """The same for the gradients of parameters, with what quantisation leaves out fed back into the next call.

    loco_param: `err_beta` in [0, 1] and `reset_T` from 1 on. What is kept lies with the parameter, as `loco_reduction`. Collective.
    Raises as `all_to_all_quant_reduce`, and for a `loco_param` without these.
    """
    beta, reset_every = _loco(loco_param)
    tensors = [param.grad for param in params]
    if any(tensor is None for tensor in tensors):
        raise DeepSpeedError("all_to_all_loco_quant_reduce: a parameter has no gradient.\n  Run backward first.")
    _check("all_to_all_loco_quant_reduce", tensors)
    hops, exchange = _hops(groups, tensors)
    found = []
    for param, part in zip(params, _in_full(tensors, exchange), strict=True):
        if not _goes(param.grad, exchange.world_size):
            found.append(part)
            continue
        kept = param.__dict__.get("loco_reduction")
        if kept is None:
            kept = QuantizedReduction(exchange, hops, feedback=lambda: ErrorFeedback(beta, reset_every))
            param.loco_reduction = kept
        found.append(_quantized(param.grad, kept))
    return found


def _check(name: str, tensors: Any) -> None:
    is_list = isinstance(tensors, Sequence) and all(isinstance(tensor, Tensor) for tensor in tensors)
    bad = [tensor.dtype for tensor in tensors if not tensor.is_floating_point()] if is_list else []
    if not is_list or bad:
        raise DeepSpeedError(
            f"{name}: {f'a tensor of {bad[0]} has no mean' if bad else f'{type(tensors).__name__} is no list of tensors'}.\n"
            "  Give a list of floating-point tensors."
        )


def _loco(loco_param: Mapping[str, Any]) -> tuple[float, int]:
    """`err_beta` and `reset_T`. Raises DeepSpeedError."""
    beta, reset_every = loco_param.get("err_beta"), loco_param.get("reset_T")
    fits = isinstance(beta, int | float) and 0 <= beta <= 1 and isinstance(reset_every, int) and reset_every >= 1
    if not fits:
        raise DeepSpeedError(
            f"all_to_all_loco_quant_reduce: loco_param = {dict(loco_param)}.\n"
            '  Give "err_beta" from 0 to 1 and "reset_T", a whole number of at least 1, such as 0.8 and 1024.'
        )
    return float(beta), reset_every  # type: ignore[arg-type, return-value]


def _in_full(tensors: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """The parts of those that are not quantised, in their places; nothing for the others."""
    world = exchange.world_size
    reduced = iter(reduce_scatter_coalesced([t for t in tensors if not _goes(t, world)], exchange.group))
    return [tensor.new_empty(0) if _goes(tensor, world) else next(reduced) for tensor in tensors]


def _goes(tensor: Tensor, world_size: int) -> bool:
    return tensor.dim() > 1 and tensor.numel() > 0 and tensor.numel() % (2 * world_size) == 0


def _quantized(tensor: Tensor, reduction: QuantizedReduction) -> Tensor:
    out = torch.empty(tensor.numel() // reduction.world_size, dtype=tensor.dtype, device=tensor.device)
    full = tensor.detach().reshape(-1)
    reduction.start_reduce_scatter(full, out, divide_by=reduction.world_size, accumulate=False).wait()
    return out


def _hops(groups: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[Hops, Exchange]:
    """This rank's two groups, by the names that the contract gives them. Raises DeepSpeedError where one is missing."""
    device = tensors[0].device if tensors else torch.device("cpu")
    exchange = make_exchange(None, device)
    if exchange.world_size == 1:
        return Hops(None, None), exchange
    rank = dist.get_rank()
    near = next((g for name, g in groups.items() if name.startswith("local_") and _is_in(g)), None)
    far = next((g for name, g in groups.items() if name.startswith("global_") and _is_in(g)), None)
    if near is None or far is None or near.size() * far.size() != exchange.world_size:
        raise DeepSpeedError(
            f"[rank {rank}] groups {sorted(groups)} do not have this rank in one `local_<node>` and one `global_<index>` group that "
            f"together reach {exchange.world_size} ranks.\n  Make a group for every node, and one over the nodes for every index."
        )
    return Hops(near if near.size() > 1 else None, far if far.size() > 1 else None), exchange


def _is_in(group: Any) -> bool:
    return isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0
