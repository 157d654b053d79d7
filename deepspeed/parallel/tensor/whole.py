"""Whole parameters for a while, of layers that are cut: `GatherReplacedLayerParams`, and what cut parameters carry themselves.

    with GatherReplacedLayerParams(params, module): ...       whole inside; what is written there is kept, each rank its part
    param.gather_params([param]); param._tp_partition([param])    the same in two calls, in place

Invariant: after it a parameter has the memory that it had before, so that whoever holds that memory (an engine's buckets) sees
what was written.
Names are the public contract of the original.
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
from deepspeed.utils.errors import ShardError

_DIM = ROLES["tensor"][0]
_CARRIED = "gather_params"


class Carried:
    """What a cut parameter carries: its group, and its own memory while it is whole. Not copied and not pickled with it."""

    def __init__(self, ranks: TensorGroup) -> None:
        self.ranks = ranks
        self.held: Tensor | None = None

    def __call__(self, params: Iterable[Tensor]) -> None:
        """`param.gather_params([param])`."""
        gather_params(params)

    def __deepcopy__(self, memo: Any) -> Carried:
        return Carried(self.ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def carry(param: nn.Parameter, ranks: TensorGroup) -> None:
    """Give a cut parameter its flags, `gather_params` and `_tp_partition`."""
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    param.ds_is_replaced_module = True  # type: ignore[attr-defined]
    param.gather_params = Carried(ranks)  # type: ignore[attr-defined]
    param._tp_partition = part_params  # type: ignore[attr-defined]


def cut_param(param: nn.Parameter, cut: marks.Cut, ranks: TensorGroup) -> None:
    """Leave a whole parameter with the ranges of `cut`, and its mark."""
    param.data = _own(param.data, cut)
    param.grad = None
    marks.cut_further(param, cut)
    carry(param, ranks)


def gather_params(params: Iterable[Tensor]) -> None:
    """Make parameters whole, in place; those that are not cut, or whole already, stay as they are. Collective over their group.

    Raises ShardError for one that ZeRO has sharded.
    """
    for param in params:
        carried = getattr(param, _CARRIED, None)
        if not isinstance(carried, Carried) or carried.held is not None:
            continue
        cut = _cut_of(param)
        if param.dim() <= cut.dim or param.shape[cut.dim] != cuts.numel(cut.ranges):
            raise ShardError(
                f"a parameter of shape {tuple(param.shape)} is sharded by ZeRO too.\n"
                "  Enter deepspeed.zero.GatheredParameters([param]) first."
            )
        shape = list(param.shape)
        shape[cut.dim] = cut.whole
        whole = torch.zeros(shape, dtype=param.dtype, device=param.device)
        for there, part in _parts(whole, param.data, cut):
            there.copy_(part)
        if carried.ranks.group is not None:
            dist.all_reduce(whole, group=carried.ranks.group)
        carried.held, param.data = param.data, whole


def part_params(params: Iterable[Tensor]) -> None:
    """Have parameters that `gather_params` made whole be this rank's parts again, with what was written to them."""
    for param in params:
        carried = getattr(param, _CARRIED, None)
        if isinstance(carried, Carried) and carried.held is not None:
            held, carried.held = carried.held, None
            held.copy_(_own(param.data, _cut_of(param)))
            param.data = held


class GatherReplacedLayerParams:
    """Whole parameters inside of a `with`; what is written to them there is kept, each rank its part. Collective.

    params: one or several; those that are not cut stay as they are. Raises ShardError for one that ZeRO has sharded.
    """

    def __init__(self, params: Tensor | Iterable[Tensor], module: nn.Module, enabled: bool = True) -> None:
        given = [params] if isinstance(params, Tensor) else list(params)
        self._params = given if enabled else []

    def __enter__(self) -> None:
        gather_params(self._params)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        part_params(self._params)


def _cut_of(param: Tensor) -> marks.Cut:
    return next(cut for cut in marks.of(param).cuts if cut.over == _DIM)


def _own(whole: Tensor, cut: marks.Cut) -> Tensor:
    return torch.cat([whole.narrow(cut.dim, a, b - a) for a, b in cut.ranges], dim=cut.dim).clone()


def _parts(whole: Tensor, own: Tensor, cut: marks.Cut) -> Iterable[tuple[Tensor, Tensor]]:
    at = 0
    for start, stop in cut.ranges:
        yield whole.narrow(cut.dim, start, stop - start), own.narrow(cut.dim, at, stop - start)
        at += stop - start
