"""`zero.TiledLinear`: a large linear layer as a grid of small ones, so that stage 3 holds one tile at a time.

After ZeRO-Infinity (arXiv:2104.07857), section 5.1.3 (memory-centric tiling).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.zero.access import GatheredParameters


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` in `parts` sizes that differ by at most one, larger first."""
    base, more = divmod(total, parts)
    return [base + 1] * more + [base] * (parts - more)


class TiledLinear(nn.Module):
    """y = x W^T + b, x [..., in_features], computed tile by tile of an `out_splits` x `in_splits` grid.

    input_is_already_split: x is a list of `in_splits` tensors. combine_out_splits: give one tensor, else a list.
    linear_cls: the class of a tile. init_linear: a layer whose weights to take over.
    Raises RuntimeError unless 1 <= splits <= features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Linear | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (("in", in_splits, in_features), ("out", out_splits, out_features)):
            if not 1 <= splits <= features:
                raise RuntimeError(
                    f"TiledLinear: {name}_splits = {splits} is not in [1, {name}_features = {features}]."
                )
        self.in_features, self.out_features = in_features, out_features
        self.in_splits, self.out_splits = in_splits, out_splits
        self.use_bias = bias
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_sizes, self.out_sizes = split_sizes(in_features, in_splits), split_sizes(out_features, out_splits)
        # The bias belongs to the last tile of a row, so that it is added once.
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(size_in, size_out, bias=bias and i == in_splits - 1, **kwargs)
                for i, size_in in enumerate(self.in_sizes)
            )
            for size_out in self.out_sizes
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """y [..., out_features], or its splits."""
        if self.in_splits > 1 and not self.input_is_already_split:
            assert isinstance(input_, Tensor)
            parts: Sequence[Tensor] = torch.split(input_, self.in_sizes, dim=-1)
        else:
            parts = list(input_) if self.input_is_already_split else [input_]  # type: ignore[list-item]
        rows = [self._row(row, parts) for row in self.linears]
        return self._combine(rows)

    def _row(self, row: Any, parts: Sequence[Tensor]) -> Any:
        total = row[0](parts[0])
        for tile, part in zip(itertools.islice(row, 1, None), parts[1:], strict=True):
            total = total + tile(part)
        return total

    def _combine(self, rows: list[Tensor]) -> Any:
        return torch.cat(rows, dim=-1) if self.combine_out_splits else rows

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        """Take the weights of a whole layer, sharded or not. Collective if anything is sharded."""
        assert (self.out_features, self.in_features) == (other.out_features, other.in_features), "same shape"
        with GatheredParameters(other.parameters()):
            weights = [w.split(self.in_sizes, dim=1) for w in other.weight.detach().split(self.out_sizes, dim=0)]
            biases = other.bias.detach().split(self.out_sizes) if self.use_bias and other.bias is not None else None
            for row in range(self.out_splits):
                for column in range(self.in_splits):
                    tile: Any = self.linears[row][column]  # type: ignore[index]
                    with GatheredParameters(tile.parameters(), modifier_rank=0):
                        tile.weight.copy_(weights[row][column])
                        if biases is not None and tile.bias is not None:
                            tile.bias.copy_(biases[row])


class TiledLinearReturnBias(TiledLinear):
    """For tile classes that return (output, bias) and leave the addition to the caller, as Megatron's do."""

    def _row(self, row: Any, parts: Sequence[Tensor]) -> Any:
        total, bias = row[0](parts[0])
        for tile, part in zip(itertools.islice(row, 1, None), parts[1:], strict=True):
            more, last_bias = tile(part)
            total, bias = total + more, last_bias if last_bias is not None else bias
        return total, bias

    def _combine(self, rows: list[Any]) -> Any:
        outputs, biases = [row[0] for row in rows], [row[1] for row in rows]
        if not self.combine_out_splits:
            return outputs, biases
        has_bias = all(bias is not None for bias in biases)
        return torch.cat(outputs, dim=-1), torch.cat(biases, dim=-1) if has_bias else None
