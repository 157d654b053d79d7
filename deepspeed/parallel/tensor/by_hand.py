"""Linear layers that scripts cut by hand: names of `deepspeed.module_inject.layers`, `tp_shard`. Tables are in `tables.py`.

`deepspeed.initialize` cuts whole models (`apply`); this is for the scripts that replace layers themselves. A layer takes over the
parameters of the `nn.Linear` that it is given, cut in place, with their marks, so that norms and checkpoints know them.

Invariant: the same layers as `initialize` makes, so that there is one product and one set of collectives.
Names and arguments are the public contract of the original.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.mesh import marks
from deepspeed.mesh.shape import ROLES
from deepspeed.parallel.tensor import cuts
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.layers import ColumnLinear, Part, RowLinear, part_of, turn
from deepspeed.parallel.tensor.rules import FUSED_BY_HEAD, Action, Spec, check_shape
from deepspeed.parallel.tensor.whole import cut_param, gather_params, part_params
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError

Parts = int | tuple[int, ...]
_BEHIND_EACH_OTHER = ("phi3", "qwen", "chatglm", "mpt", "gpt_bigcode")
"""Model types whose fused attention has all queries, then all keys, then all values."""

_DIM = ROLES["tensor"][0]
_NOT_BY_HEAD = ("mlp", "lm_head", "embed_out", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _ranks(group: Any) -> TensorGroup:
    return (
        TensorGroup(None, 0, 1)
        if group is None
        else TensorGroup(group, dist.get_rank(group), dist.get_world_size(group))
    )


def _take(layer: nn.Module, module: nn.Module, dim: int, ranks: TensorGroup, parts: Parts = 1) -> tuple[int, ...]:
    """Have `layer` own the rank's part of the module's parameters; the sizes of all parts.

    dim: of the weight; the last dimension of a bias is cut with the outputs. parts: layers in one, each cut by itself.
    """
    params: Any = [(name, getattr(module, name, None)) for name in ("weight", "bias")]
    whole = int(params[0][1].shape[dim])
    if whole < ranks.size:
        raise DeepSpeedConfigError(
            f"{type(layer).__name__}: {whole} indices to cut, fewer than the {ranks.size} ranks of the group."
        )
    pieces = [_pieces(whole, parts, ranks.size, rank) for rank in range(ranks.size)]
    out_dim = 0 if isinstance(module, nn.Linear) else 1
    for name, param in params:
        if param is not None and (name == "weight" or dim == out_dim) and ranks.size > 1:
            cut_param(param, marks.Cut(_DIM, dim if name == "weight" else 0, pieces[ranks.rank], whole), ranks)
        if name in layer._parameters or param is not None:
            setattr(layer, name, param)
    return tuple(cuts.numel(ranges) for ranges in pieces)


def _pieces(size: int, parts: Parts, num_ranks: int, rank: int) -> cuts.Ranges:
    if isinstance(parts, int):
        sizes: tuple[int, ...] = (size // parts,) * parts
    else:
        rest = size - sum(part for part in parts if part > 0)
        sizes = tuple(part if part > 0 else rest for part in parts)
    if sum(sizes) != size:
        raise DeepSpeedConfigError(f"{size} indices are not the parts {parts} of the layer's shape.")
    start, found = 0, []
    for part in sizes:
        low, high = cuts.even(part, num_ranks, rank)
        found.append((start + low, start + high))
        start += part
    return cuts.packed(found)


def _parts_of(shape: Any, dim: int) -> Parts:
    """From a fused weight's shape, [parts, -1] or the like, to the parts of its dimension `dim`."""
    check_shape(Spec((), Action.COLUMN, tuple(shape), dim))
    if len(shape) != 2:
        raise DeepSpeedConfigError(
            f"shape {tuple(shape)}: a linear layer's weight has 2 dimensions, the one that is cut as the number of its parts or as a tuple "
            "of their sizes."
        )
    size = shape[dim]
    return tuple(size) if isinstance(size, (tuple, list)) else int(size)


class LinearLayer(ColumnLinear):
    """Rows of a linear layer: [.., in] whole -> [.., out of this rank], or all of it with `gather_output`.

    mp_group: the ranks that share it; None leaves it whole.
    """

    def __init__(
        self, module: nn.Linear, mp_group: Any = None, *, name: str | None = None, gather_output: bool = False, **_: Any
    ) -> None:
        super().__init__(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        self._own(module, _ranks(mp_group), 1, name, gather_output)

    def _own(
        self, module: nn.Linear, ranks: TensorGroup, parts: Parts, name: str | None, gathers: bool = False
    ) -> None:
        if gathers and parts != 1:
            raise NotAvailableError("gather_output for a layer that is several in one.\n  Gather its parts yourself.")
        lengths = _take(self, module, 0, ranks, parts)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths, gathers=gathers))

    gather_params = staticmethod(gather_params)
    _tp_partition = staticmethod(part_params)


class SubParamLinearLayer(LinearLayer):
    """Several linear layers in one, each cut by itself. `shape`: [parts, -1], where parts is their number or their sizes."""

    def __init__(
        self,
        module: nn.Linear,
        mp_group: Any = None,
        shape: Any = (1, -1),
        partition_dim: int = 0,
        *,
        name: str | None = None,
        **_: Any,
    ) -> None:
        nn.Linear.__init__(self, module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        if partition_dim != 0:
            raise DeepSpeedConfigError(f"SubParamLinearLayer(partition_dim={partition_dim}): rows are dimension 0.")
        self._own(module, _ranks(mp_group), _parts_of(shape, 0), name)


class GateUpPack_LinearLayer(SubParamLinearLayer):  # noqa: N801 - the public name
    """Gate and up in one."""

    def __init__(self, module: nn.Linear, mp_group: Any = None, *, name: str | None = None, **_: Any) -> None:
        super().__init__(module, mp_group, (2, -1), name=name)


class fused_LinearLayer(SubParamLinearLayer):  # noqa: N801 - the public name
    """Queries, keys and values in one. fused_module: the attention or block that has the layer, whose `config` tells the order of rows:
    q, k and v behind each other, or head by head. Or `shape`, as of SubParamLinearLayer."""

    def __init__(
        self,
        module: nn.Linear,
        mp_group: Any = None,
        *,
        fused_module: Any = None,
        shape: Any = None,
        name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(module, mp_group, shape or _fused_shape(module, fused_module), name=name)


def _fused_shape(module: nn.Linear, around: Any) -> tuple[Any, int]:
    config = getattr(around, "config", None)
    if config is None:
        owners = around.modules() if isinstance(around, nn.Module) else ()
        config = next((m.config for m in owners if hasattr(m, "config")), None)
    kind, rows = getattr(config, "model_type", None), module.out_features
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and kind in FUSED_BY_HEAD:
        return (1, -1)  # heads in order: consecutive rows are heads
    if isinstance(heads, int) and kind in _BEHIND_EACH_OTHER:
        kv = getattr(config, "num_key_value_heads", None) or heads
        if rows % (heads + 2 * kv) == 0:
            width = rows // (heads + 2 * kv)
            return ((heads * width, kv * width, kv * width), -1)
    raise DeepSpeedConfigError(
        f"fused_LinearLayer: nothing tells how the {rows} rows of the layer are ordered (model type {kind!r}).\n"
        "  Give fused_module, a module whose config says it, or shape=((rows of q, rows of k, rows of v), -1)."
    )


class conv_LinearLayer(nn.Module):  # noqa: N801 - the public name
    """Outputs of Transformers' `Conv1D`, whose weight is [in, out]: [.., in] whole -> [.., out of this rank]."""

    weight: nn.Parameter

    def __init__(self, module: nn.Module, mp_group: Any = None, *, name: str | None = None, **_: Any) -> None:
        super().__init__()
        ranks = _ranks(mp_group)
        self.bias: nn.Parameter | None = None
        lengths = _take(self, module, 1, ranks)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out of this rank]."""
        return F.linear(part_of(self).enter(x), self.weight.t(), self.bias)

    gather_params = staticmethod(gather_params)
    _tp_partition = staticmethod(part_params)


class Conv_LinearALlreduce(nn.Module):  # noqa: N801 - the public name
    """Inputs of a `Conv1D`: [.., in of this rank] -> [.., out] whole; the bias is added once."""

    weight: nn.Parameter

    def __init__(self, module: nn.Module, mp_group: Any = None, *, name: str | None = None, **_: Any) -> None:
        super().__init__()
        ranks = _ranks(mp_group)
        self.bias: nn.Parameter | None = None
        lengths = _take(self, module, 0, ranks)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in of this rank] -> [.., out]."""
        out = part_of(self).leave(F.linear(x, self.weight.t()))
        return out if self.bias is None else out + self.bias

    gather_params = staticmethod(gather_params)
    _tp_partition = staticmethod(part_params)


class LinearAllreduce(RowLinear):
    """Columns of a linear layer: [.., in of this rank] -> [.., out] whole; the bias is added once."""

    _splits = False

    def __init__(self, module: nn.Linear, mp_group: Any = None, *, name: str | None = None, **_: Any) -> None:
        super().__init__(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        self._own(module, _ranks(mp_group), 1, name)

    def _own(self, module: nn.Linear, ranks: TensorGroup, parts: Parts, name: str | None) -> None:
        lengths = _take(self, module, 1, ranks, parts)
        self.name = name
        turn(self, type(self), Part(ranks=ranks, lengths=lengths, splits=self._splits))

    gather_params = staticmethod(gather_params)
    _tp_partition = staticmethod(part_params)


class SubParamLinearAllreduce(LinearAllreduce):
    """The same of inputs that are several in one. `shape`: [-1, parts], where parts is their number or their sizes."""

    def __init__(
        self,
        module: nn.Linear,
        mp_group: Any = None,
        shape: Any = (-1, 1),
        partition_dim: int = 1,
        *,
        name: str | None = None,
        **_: Any,
    ) -> None:
        nn.Linear.__init__(self, module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        if partition_dim != 1:
            raise DeepSpeedConfigError(
                f"SubParamLinearAllreduce(partition_dim={partition_dim}): inputs are dimension 1."
            )
        self._own(module, _ranks(mp_group), _parts_of(shape, 1), name)


class LinearAllreduceWithReplicatedInput(LinearAllreduce):
    """The same from whole inputs, of which each rank takes its slice."""

    _splits = True


VocabParallelLinear = LinearLayer
"""A head whose logits stay in parts, [.., words of this rank]."""
LmHeadLinearAllreduce = LinearAllreduceWithReplicatedInput
"""The same, by the name that heads have in the original."""


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
