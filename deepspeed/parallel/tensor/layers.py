"""Layers of which each rank holds a part: plain parameters, and the collectives around one product.

`apply` turns a model's layers into these, in place: the module stays the object that hooks, names and other modules know, its
class and its parameters' memory change. Which indices are held is the parameters' mark (`mesh.marks`).

    ColumnLinear     rows of the weight        [.., in]  -> [.., out/t], or all of out where `gathers`
    HeadLinear       the whole weight          [.., in]  -> the heads that this rank's queries need (fewer kv heads than ranks)
    RowLinear        columns of the weight     [.., in/t] (or [.., in] where `splits`) -> [.., out]
    ConvColumn, ConvRow    both of Transformers' `Conv1D`, whose weight is [in, out]
    VocabEmbedding   rows of the table         ids -> [.., width]
    WidthEmbedding   columns of the table      ids -> [.., width]

Invariant: with all ranks' parts joined, outputs and gradients are the whole layer's. A row layer's bias is whole on every rank
and added once, after the sum.
After Megatron-LM (arXiv:1909.08053), sec. 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from deepspeed.parallel.tensor.collectives import ColumnOverlapped, TensorGroup
from deepspeed.parallel.tensor.regions import Region
from deepspeed.utils.values import has_values

PART = "tensor_part"
"""The attribute of a layer that has its `Part`."""
_PLAIN = ("FalconLinear",)
"""Classes whose own forward is the base's product, written differently."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a layer has to know beside its parameters."""

    ranks: TensorGroup
    lengths: tuple[int, ...]
    """How many indices of the cut dimension each rank holds."""
    gathers: bool = False
    splits: bool = False
    overlaps: bool = False
    heads: tuple[int, ...] = ()
    """HeadLinear: the heads to give out, in order, perhaps one several times."""
    num_heads: int = 1
    """HeadLinear: how many there are in the weight."""
    region: Region | None = None
    """Where ranks have some tokens each between layers: what enters was gathered, and what leaves is scattered."""

    @property
    def is_divided(self) -> bool:
        """Whether tokens are divided now."""
        return self.region is not None and self.region.is_open

    def enter(self, x: Tensor) -> Tensor:
        """What a column layer multiplies."""
        return x if self.is_divided else self.ranks.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """What becomes of a row layer's part."""
        return self.region.scatter(x) if self.region is not None and self.region.is_open else self.ranks.leave(x)


def part_of(module: nn.Module) -> Part:
    """What `turn` was given."""
    part = module.__dict__[PART]
    assert isinstance(part, Part)
    return part


def turn(module: nn.Module, kind: type[nn.Module], part: Part) -> None:
    """Have `module` be a layer of `kind`; its parameters were cut already."""
    module.__dict__[PART] = part
    module.__class__ = kind


class ColumnLinear(nn.Linear):
    """Each rank computes some of the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] whole -> [.., out of this rank], or [.., out]."""
        part = part_of(self)
        if part.overlaps and not part.is_divided and part.ranks.size > 1 and torch.is_grad_enabled():
            out: Tensor = ColumnOverlapped.apply(x, self.weight, self.bias, part.ranks)
        else:
            out = F.linear(part.enter(x), self.weight, self.bias)
        if not part.gathers:
            return out
        part.ranks.forget()
        return part.ranks.gather(out, part.lengths)

    def extra_repr(self) -> str:
        """With how much of the layer this rank has."""
        return f"{super().extra_repr()}, {_share(self)}"


class HeadLinear(nn.Linear):
    """Whole on every rank, which computes the heads it needs; its gradient is a part of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] whole -> [.., heads of this rank]."""
        part = part_of(self)
        width = self.weight.shape[0] // part.num_heads
        needed = sorted(set(part.heads))
        first, last = needed[0] * width, (needed[-1] + 1) * width
        bias = None if self.bias is None else self.bias[first:last]
        out = F.linear(part.enter(x), self.weight[first:last], bias)
        if list(part.heads) == needed:
            return out
        index = torch.tensor([head - needed[0] for head in part.heads], device=out.device)
        return out.unflatten(-1, (-1, width)).index_select(-2, index).flatten(-2)


class RowLinear(nn.Linear):
    """Each rank multiplies some of the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in of this rank], or [.., in] where it is split here -> [.., out] whole."""
        part = part_of(self)
        if part.splits:
            x = part.ranks.split(x, part.lengths)
        out = part.leave(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """With how much of the layer this rank has."""
        return f"{super().extra_repr()}, {_share(self)}"


class ConvColumn(nn.Module):
    """Some of the outputs of a `Conv1D`, whose weight is [in, out]."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] whole -> [.., out of this rank], or [.., out]."""
        part = part_of(self)
        out = F.linear(part.enter(x), self.weight.t(), self.bias)
        if not part.gathers:
            return out
        part.ranks.forget()
        return part.ranks.gather(out, part.lengths)

    def extra_repr(self) -> str:
        """How much of the layer this rank has."""
        return _share(self)


class ConvRow(nn.Module):
    """Some of the inputs of a `Conv1D`; the bias is whole on every rank, and added after the sum."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[.., in of this rank], or [.., in] where it is split here -> [.., out] whole."""
        part = part_of(self)
        if part.splits:
            x = part.ranks.split(x, part.lengths)
        return part.leave(F.linear(x, self.weight.t())) + self.bias

    def extra_repr(self) -> str:
        """How much of the layer this rank has."""
        return _share(self)


_TRANSPOSED: Mapping[type[nn.Module], type[nn.Module]] = {ColumnLinear: ConvColumn, RowLinear: ConvRow}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of some kind, that calls its own product."""
    return (isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)) or is_conv1d(
        module
    )


def widths(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)


class VocabEmbedding(nn.Embedding):
    """Each rank looks up the ids of its range; those of others are zeros."""

    def forward(self, ids: Tensor) -> Tensor:
        """[..] -> [.., width] whole."""
        part = part_of(self)
        return part.ranks.leave(self._lookup(ids, part))

    def _lookup(self, ids: Tensor, part: Part) -> Tensor:
        check_ids(ids, sum(part.lengths))
        start = sum(part.lengths[: part.ranks.rank])
        local = ids - start
        is_elsewhere = (local < 0) | (local >= part.lengths[part.ranks.rank])
        padding = self.padding_idx
        own_padding = padding - start if padding is not None and 0 <= padding - start < self.weight.shape[0] else None
        found = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight, own_padding)
        return found.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)


def check_ids(ids: Tensor, num_embeddings: int) -> None:
    """Raise IndexError for ids that no rank's range has, as `nn.Embedding` does; its error has no place among ranges. On a device by an assertion there."""
    if ids.is_meta or not has_values(ids) or not ids.numel():
        return
    is_inside = ((ids >= 0) & (ids < num_embeddings)).all()
    if ids.device.type != "cpu":
        torch._assert_async(is_inside)
    elif not is_inside:
        wrong = ids[(ids < 0) | (ids >= num_embeddings)].flatten()
        raise IndexError(
            f"id {int(wrong[0])} is outside of an embedding of {num_embeddings} rows, which is cut over tensor-parallel ranks.\n"
            "  Check the tokenizer's vocabulary against the model's, and ids that mark labels to ignore."
        )


class WidthEmbedding(nn.Embedding):
    """Each rank looks up a slice of every vector."""

    def forward(self, ids: Tensor) -> Tensor:
        """[..] -> [.., width] whole."""
        part = part_of(self)
        found = F.embedding(ids, self.weight, self.padding_idx)
        return part.ranks.gather(found, part.lengths)


def _share(module: nn.Module) -> str:
    part = part_of(module)
    return f"{part.lengths[part.ranks.rank]} of {sum(part.lengths)} on rank {part.ranks.rank} of {part.ranks.size}"


@functools.cache
def _around(own: type[nn.Module], wanted: type[nn.Module]) -> type[nn.Module]:
    return type(f"{wanted.__name__}Of{own.__name__}", (own, wanted), {})


def kind_for(module: nn.Module, wanted: type[nn.Module]) -> type[nn.Module] | None:
    """`wanted`, or where the module's class only surrounds its base's forward (a scaled embedding), a class that does the same
    around `wanted`; None for a class with another product of its own, a module whose forward a script has replaced, and the output of
    `nn.MultiheadAttention`, which reads its weight instead of calling it."""
    if "forward" in module.__dict__ or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if is_conv1d(module):
        return _TRANSPOSED.get(wanted)
    base: Any = nn.Linear if issubclass(wanted, nn.Linear) else nn.Embedding
    own = type(module)
    if own is base or own.__name__ in _PLAIN:
        return wanted
    if not isinstance(module, base):
        return None
    forward = own.forward
    made: type[nn.Module] = _around(own, wanted)  # type: ignore[arg-type]
    return made if forward is base.forward or "super" in forward.__code__.co_names else None
