"""Quantized layers of which each rank holds a part: what `parallel.tensor.layers` are, with weights of 8 or 4 bits.

Made by `quantize_layers` through the table of `quant.replace`, from layers that were cut already.
"""

from __future__ import annotations

from torch import Tensor, nn

from deepspeed.parallel.tensor.layers import (
    ColumnLinear,
    ConvColumn,
    ConvRow,
    Part,
    RowLinear,
    VocabEmbedding,
    check_ids,
    part_of,
)
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from deepspeed.quant.replace import Make


class QuantizedColumn(QuantizedLinear):
    """Each rank computes some of the outputs."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, part: Part) -> None:
        super().__init__(weight, bias)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] whole -> [.., out of this rank], or [.., out]."""
        out = super().forward(x)
        return self.part.ranks.gather(out, self.part.lengths) if self.part.gathers else out


class QuantizedRow(nn.Module):
    """Each rank multiplies some of the inputs; the bias, whole on every rank, is added after the sum."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, part: Part) -> None:
        super().__init__()
        self.product = QuantizedLinear(weight, None)
        self.part = part
        self.in_features, self.out_features = weight.width, weight.rows
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """[out, in of this rank]."""
        return self.product.weight

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        """As a module's; a whole weight is the product's."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}product.weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in of this rank], or [.., in] where it is split here -> [.., out] whole."""
        if self.part.splits:
            x = self.part.ranks.split(x, self.part.lengths)
        out = self.part.ranks.leave(self.product(x))
        return out if self.bias is None else out + self.bias


class QuantizedVocabEmbedding(QuantizedEmbedding):
    """Each rank looks up the ids of its range; those of others are zeros."""

    def __init__(self, weight: QuantizedWeight, padding_idx: int | None, part: Part) -> None:
        super().__init__(weight, padding_idx)
        self.part = part

    def forward(self, indices: Tensor) -> Tensor:
        """[..] -> [.., width] whole."""
        check_ids(indices, sum(self.part.lengths))
        local = indices - sum(self.part.lengths[: self.part.ranks.rank])
        is_elsewhere = (local < 0) | (local >= self.num_embeddings)
        found = super().forward(local.masked_fill(is_elsewhere, 0)).masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
        return self.part.ranks.leave(found)


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    return bias if isinstance(bias, Tensor) else None


MAKE: dict[type[nn.Module], Make] = {
    ColumnLinear: lambda layer, weight: QuantizedColumn(weight, _bias(layer), part_of(layer)),
    RowLinear: lambda layer, weight: QuantizedRow(weight, _bias(layer), part_of(layer)),
    ConvColumn: lambda layer, weight: QuantizedColumn(weight, _bias(layer), part_of(layer)),
    ConvRow: lambda layer, weight: QuantizedRow(weight, _bias(layer), part_of(layer)),
    VocabEmbedding: lambda layer, weight: QuantizedVocabEmbedding(weight, None, part_of(layer)),
}
"""By the exact class of a layer, what takes its place."""
