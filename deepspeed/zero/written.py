"""What a model's own code writes into parameters while it runs, where they are sharded afterwards: it stays, as in plain PyTorch.

Asked by `zero.bucket` when a bucket is resharded after a module's call: weights clamped in `forward`, `nn.Embedding(max_norm=...)`,
hooks that write, `param.data = ...`. Each rank takes its own part of what it wrote, also where others wrote something else, which nobody
compares. Masters follow in the step (`zero.takeover`). What gather contexts change is `zero.access`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepspeed.utils.logging import warn_once


@dataclass(slots=True)
class Written:
    """What is known of one bucket."""

    versions: list[int]
    """Torch's counters of its parameters, when they were last looked at."""
    may_be: bool = False
    """Whether somebody took `param.data`, through which values are written past those counters, since the last reshard."""
    is_in_shard: bool = False
    """Whether the shard was written, so that a master has to follow."""


class Writable(Protocol):
    """What is asked of a bucket (`zero.bucket`)."""

    params: list[nn.Parameter]
    names: list[str]
    written: Written
    full: Tensor
    keeps_storage: bool
    exchange: Any
    gathered_by: Any

    @property
    def shard(self) -> Tensor:
        """This rank's slice at rest."""
        ...

    def own_slice(self, flat: Tensor) -> Tensor:
        """This rank's slice of `flat`."""
        ...

    def assigned(self) -> list[Any]:
        """Parameters that were given other data."""
        ...

    def take_assigned(self, assigned: Sequence[Any]) -> None:
        """Take over what `assigned` found."""

    def write_shard(self) -> None:
        """Take the slice at rest from the full values."""


def keep_written(bucket: Writable, versions: list[int]) -> None:
    """Take this rank's part of what was written, if anything was; the bucket is unsharded. versions: torch's counters now."""
    bucket.written.versions = versions
    bucket.take_assigned(bucket.assigned())
    if bucket.keeps_storage or torch.equal(
        _bits(bucket.own_slice(bucket.full)), _bits(bucket.shard.to(bucket.full.device))
    ):
        return
    if bucket.gathered_by is not bucket.exchange:
        warn_once(
            f"{bucket.names[0]}, or another parameter of its bucket, is written while the model runs, and is what it was again: it is "
            "gathered in fewer bits, or from copies (zero_quantized_weights, zero_hpz_partition_size).\n"
            "  Write it between steps, inside of deepspeed.zero.GatheredParameters([param], modifier_rank=0)."
        )
        return
    bucket.write_shard()
    bucket.written.is_in_shard = True


def settle_written(bucket: Writable) -> None:
    """The same, if anything may have been written, of a bucket that is unsharded: before somebody else writes or reads its shard."""
    with torch._C.DisableTorchFunctionSubclass():
        versions = [param._version for param in bucket.params]
    if bucket.written.may_be or versions != bucket.written.versions:
        keep_written(bucket, versions)
        bucket.written.may_be = False


def _bits(values: Tensor) -> Tensor:
    """As integers: a nan equals itself."""
    return values.view(torch.uint8)
