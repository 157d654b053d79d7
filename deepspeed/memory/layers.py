"""A model's layers as one of the ranks has them that share each: cut as the engine cuts, without ranks and by shapes alone.

Called by the estimator before it traces. The rank that is played is the first, whose parts are the largest; what it sends and
receives takes the memory that it takes on the wire's ends, and nothing arrives.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepspeed.assembly.tensor import layer_wishes
from deepspeed.config import Config
from deepspeed.parallel.tensor.apply import PARSED, carry_out, draw
from deepspeed.parallel.tensor.choose import require_found
from deepspeed.parallel.tensor.collectives import TensorGroup


class _Sent:
    """A collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


class AbsentRanks(TensorGroup):
    """`size` ranks of which only this one is there, the first if nothing else is said."""

    def __init__(self, size: int, rank: int = 0) -> None:
        super().__init__(None, rank, size)

    def start_sum(self, x: Tensor) -> Any:
        """The sum is as large as `x`."""
        return _Sent()

    def max_(self, x: Tensor) -> Tensor:
        """As large as `x`."""
        return x

    def broadcast_(self, x: Tensor) -> None:
        """The first rank has its values."""

    def _all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        """The parts are there, to be written by others."""

    def _reduce_scatter(self, own: Tensor, parts: list[Tensor]) -> None:
        """The sum is as large as the own part."""


def layer_ranks(config: Config) -> int:
    """Over how many ranks the configuration cuts layers."""
    return max(config.tensor_parallel.autotp_size, 1)


def cut_layers(model: nn.Module, config: Config) -> None:
    """Have `model`, which has shapes only, be the first rank's parts, unless it is parts already. Raises what the engine raises."""
    if (size := layer_ranks(config)) == 1 or PARSED in model.__dict__:
        return
    ranks = AbsentRanks(size)
    chosen, drawn = draw(model, ranks, layer_wishes(config))
    require_found(model, [chosen])
    carry_out(model, ranks, drawn, lambda param: None)
