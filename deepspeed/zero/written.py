"""What a model's own code writes into parameters while it runs, where they are sharded afterwards: it stays, as in plain PyTorch.

Asked by `zero.bucket` when a bucket is resharded after a module's call: weights clamped in `forward`, `nn.Embedding(max_norm=...)`,
hooks that write, `param.data = ...`. Each rank takes its own part of what it wrote. That others wrote something else is told once in so many
steps (`not_alike`): each write leaves a digest of the whole parameter, which ranks compare where they meet anyway. Masters follow in the
step (`zero.takeover`, which asks). What gather contexts change is `zero.access`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepspeed.utils.logging import warn_once
from deepspeed.zero.modes import plain_modes

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: as what its bits are added up."""

MOST_DIGESTS = 64
"""Of one parameter between two updates: a model that only evaluates may write for ever."""

Writes = Mapping[tuple[str, int], Sequence[int]]
"""A rank's, by parameter and the number of the bucket's update that they came before: digests of what was written."""


@dataclass(slots=True)
class Written:
    """What is known of one bucket."""

    versions: list[int]
    """Torch's counters of its parameters, when they were last looked at."""
    may_be: dict[int, Tensor | None] = field(default_factory=dict)
    """Parameters, by place, whose `data` somebody took since the last reshard, through which values are written past those counters: a
    digest of what they were, or None where other data were given."""
    is_in_shard: bool = False
    """Whether the shard was written, so that a master has to follow."""
    writes: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    """See `Writes`; since ranks last compared."""


class Writable(Protocol):
    """What is asked of a bucket (`zero.bucket`)."""

    params: list[nn.Parameter]
    names: list[str]
    views: list[Tensor]
    layout: Any
    over: Any
    num_updates: int
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

    def leave_memory(self) -> None:
        """Leave what is there to those who took it away."""

    def take_assigned(self, assigned: Sequence[Any]) -> None:
        """Take over what `assigned` found."""

    def write_shard(self) -> None:
        """Take the slice at rest from the full values."""


def data_taken(bucket: Writable, place: int) -> None:
    """Somebody is about to read `data` of the parameter at this place, or to write through it."""
    if place not in bucket.written.may_be:
        bucket.written.may_be[place] = _digest(bucket.views[place]) if _compares(bucket) else None


def keep_written(bucket: Writable, versions: list[int]) -> None:
    """Take this rank's part of what was written, if anything was; the bucket is unsharded. versions: torch's counters now."""
    written, before = bucket.written, dict(bucket.written.may_be)
    counted = [i for i, pair in enumerate(zip(written.versions, versions, strict=False)) if pair[0] != pair[1]]
    written.versions = versions
    assigned = bucket.assigned()
    if _compares(bucket):
        before.update((place, _digest(bucket.views[place])) for place, _ in assigned)
    if assigned and not bucket.keeps_storage:
        bucket.leave_memory()
    bucket.take_assigned(assigned)
    if _compares(bucket):
        _note(bucket, counted, before)
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


def keep_if_written(bucket: Writable) -> None:
    """The same, if anything may have been written, of a bucket that is unsharded: before somebody else writes or reads its shard."""
    with torch._C.DisableTorchFunctionSubclass():
        versions = [param._version for param in bucket.params]
    if bucket.written.may_be or versions != bucket.written.versions:
        keep_written(bucket, versions)
        bucket.written.may_be.clear()


def take_writes(buckets: Iterable[Writable]) -> Writes:
    """What this rank's modules wrote since this was last asked."""
    found: dict[tuple[str, int], list[int]] = {}
    for bucket in buckets:
        if bucket.written.writes:
            found |= {at: sorted(digests) for at, digests in bucket.written.writes.items()}
            bucket.written.writes.clear()
    return found


def not_alike(everyone: Sequence[Writes]) -> tuple[str, int] | None:
    """The first parameter of which some rank wrote what another did not, and the first rank (by place) unlike the first one."""
    for at in dict.fromkeys(at for writes in everyone for at in writes):
        for place, writes in enumerate(everyone):
            if writes.get(at) != everyone[0].get(at):
                return at[0], place
    return None


def _note(bucket: Writable, counted: Sequence[int], before: Mapping[int, Tensor | None]) -> None:
    """counted: places of parameters that torch saw written, whatever is in them now."""
    for place in {*counted, *before}:
        then, now = before.get(place), _digest(bucket.views[place])
        if place in counted or (then is not None and bool(then != now)):
            at = (bucket.names[place], bucket.num_updates)
            digests = bucket.written.writes.setdefault(at, set())
            if len(digests) < MOST_DIGESTS:
                digests.add(int(now))


def _compares(bucket: Writable) -> bool:
    """Whether ranks have to have the same in it: experts differ, and so does what was gathered in fewer bits."""
    is_here = bucket.full.untyped_storage().nbytes() > 0
    return is_here and bucket.layout.world_size > 1 and bucket.over == "shard" and bucket.gathered_by is bucket.exchange


def _digest(values: Tensor) -> Tensor:
    """A sum of its bits, on the device."""
    with plain_modes(), torch._C.DisableTorchFunctionSubclass():
        values = torch.view_as_real(values) if values.is_complex() else values
        return values.detach().reshape(-1).view(INTEGERS[values.itemsize]).sum(dtype=torch.int64)


def _bits(values: Tensor) -> Tensor:
    """As integers: a nan equals itself."""
    return values.view(torch.uint8)
