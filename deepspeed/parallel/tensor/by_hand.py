"""Layers that scripts cut by hand, and whole parameters for a while: the names of `deepspeed.module_inject.layers`, `tp_shard`.

`deepspeed.initialize` cuts whole models (`apply`); this is for the scripts that replace layers themselves. A layer takes over the
parameters of the `nn.Linear` that it is given, cut in place, with their marks, so that norms and checkpoints know them.

Invariant: the same layers as `initialize` makes, so that there is one product and one set of collectives.
Names and arguments are the public contract of the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.mesh import marks
from deepspeed.mesh.shape import ROLES
from deepspeed.parallel.tensor import cuts
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.layers import ColumnLinear, Part, RowLinear, turn
from deepspeed.utils.errors import ShardError

_DIM = ROLES["tensor"][0]
_NOT_BY_HEAD = ("mlp", "lm_head", "embed_out", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _ranks(group: Any) -> TensorGroup:
    return (
        TensorGroup(None, 0, 1)
        if group is None
        else TensorGroup(group, dist.get_rank(group), dist.get_world_size(group))
    )


def _take(layer: nn.Linear, module: nn.Linear, dim: int, ranks: TensorGroup) -> tuple[int, ...]:
    """Have `layer` own the rank's part of the module's parameters; the sizes of all parts."""
    whole = int(module.weight.shape[dim])
    ranges = [cuts.even(whole, ranks.size, rank) for rank in range(ranks.size)]
    start, stop = ranges[ranks.rank]
    params: Any = (("weight", module.weight), ("bias", module.bias))
    for name, param in params:
        is_cut = param is not None and (name == "weight" or dim == 0) and ranks.size > 1
        if is_cut:
            param.data = param.data.narrow(dim, start, stop - start).clone()
            marks.mark(param, marks.Mark(cuts=(marks.Cut(_DIM, dim, ((start, stop),), whole),)))
            param.tensor_model_parallel = True
            param.ds_is_replaced_module = True
        setattr(layer, name, param)
    return tuple(stop - start for start, stop in ranges)


class LinearLayer(ColumnLinear):
    """Rows of a linear layer: [.., in] whole -> [.., out of this rank], or all of it with `gather_output`.

    mp_group: the ranks that share it; None leaves it whole.
    """

    def __init__(
        self, module: nn.Linear, mp_group: Any = None, *, name: str | None = None, gather_output: bool = False, **_: Any
    ) -> None:
        super().__init__(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        ranks = _ranks(mp_group)
        lengths = _take(self, module, 0, ranks)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths, gathers=gather_output))


class LinearAllreduce(RowLinear):
    """Columns of a linear layer: [.., in of this rank] -> [.., out] whole; the bias is added once."""

    _splits = False

    def __init__(self, module: nn.Linear, mp_group: Any = None, *, name: str | None = None, **_: Any) -> None:
        super().__init__(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        ranks = _ranks(mp_group)
        lengths = _take(self, module, 1, ranks)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths, splits=self._splits))


class LinearAllreduceWithReplicatedInput(LinearAllreduce):
    """The same from whole inputs, of which each rank takes its slice."""

    _splits = True


LmHeadLinearAllreduce = LinearAllreduceWithReplicatedInput
"""The same, by the name that heads have in the original."""


class GatherReplacedLayerParams:
    """Whole parameters inside of a `with`; what is written to them there is kept, each rank its part. Collective.

    params: one or several; those that are not cut stay as they are. Raises ShardError for one that ZeRO has sharded.
    """

    def __init__(self, params: nn.Parameter | Iterable[nn.Parameter], module: nn.Module, enabled: bool = True) -> None:
        given = [params] if isinstance(params, Tensor) else list(params)
        self._params = [p for p in given if enabled and any(cut.over == _DIM for cut in marks.of(p).cuts)]
        self._group = next(
            (m.__dict__["tensor_part"].ranks.group for m in module.modules() if "tensor_part" in m.__dict__), None
        )

    def __enter__(self) -> None:
        for param in self._params:
            cut = _cut_of(param)
            if param.dim() <= cut.dim or param.shape[cut.dim] != cuts.numel(cut.ranges):
                raise ShardError(
                    f"a parameter of shape {tuple(param.shape)} is sharded by ZeRO too.\n"
                    "  Enter deepspeed.zero.GatheredParameters([param]) first."
                )
            shape = list(param.shape)
            shape[cut.dim] = cut.whole
            whole = torch.zeros(shape, dtype=param.dtype, device=param.device)
            for own, part in _parts(whole, param.data, cut):
                own.copy_(part)
            if self._group is not None:
                dist.all_reduce(whole, group=self._group)
            param.data = whole

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for param in self._params:
            cut = _cut_of(param)
            param.data = torch.cat([param.data.narrow(cut.dim, a, b - a) for a, b in cut.ranges], dim=cut.dim).clone()


def _cut_of(param: Tensor) -> marks.Cut:
    return next(cut for cut in marks.of(param).cuts if cut.over == _DIM)


def _parts(whole: Tensor, own: Tensor, cut: marks.Cut) -> Iterable[tuple[Tensor, Tensor]]:
    at = 0
    for start, stop in cut.ranges:
        yield whole.narrow(cut.dim, start, stop - start), own.narrow(cut.dim, at, stop - start)
        at += stop - start


def get_shard_size(
    total_size: int,
    mp_size: int,
    meta: Any = None,
    name: str | None = None,
    rank: int | None = None,
    mp_group: Any = None,
) -> int:
    """How many of `total_size` indices a rank holds: whole key and value heads where `meta` knows their number, else even parts.

    meta: an object with `num_kv_heads`, that number, or None. rank: default the group's, or the job's.
    """
    if rank is None:
        rank = dist.get_rank(mp_group) if dist.is_initialized() else 0
    return get_shard_size_list(total_size, mp_size, meta, name)[rank % mp_size]


def get_shard_size_list(total_size: int, mp_size: int, meta: Any = None, name: str | None = None) -> list[int]:
    """`get_shard_size` of every rank."""
    if isinstance(meta, str):  # older callers give the name third
        meta, name = None, meta
    heads: int = (meta if isinstance(meta, int) else getattr(meta, "num_kv_heads", None)) or 0
    is_by_head = heads > 0 and total_size % heads == 0 and not any(word in (name or "") for word in _NOT_BY_HEAD)
    pieces = [
        cuts.blocks(total_size, heads, mp_size, rank) if is_by_head else cuts.even(total_size, mp_size, rank)
        for rank in range(mp_size)
    ]
    return [stop - start for start, stop in pieces]
