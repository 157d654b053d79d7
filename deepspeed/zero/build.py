"""From a model and a policy to buckets: cut, lay out, fill, shard, one bucket at a time.

Called once by the engine. The model may be plain, or already sharded by `zero.Init` or an earlier engine; either way
at most one bucket is whole at a time beyond what the policy keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepspeed.comm.spread import spread
from deepspeed.mesh import Mesh
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.zero.bucket import Bucket, LoadQueue
from deepspeed.zero.cut import Unit, cut_by_module, cut_by_size, users_of
from deepspeed.zero.layout import BucketLayout, group_neighbours
from deepspeed.zero.master import Master
from deepspeed.zero.param import Slot, ZeroParameter, full_numel, full_shape, slot_of
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import SHARD_DIMS

MAX_BUCKET_NUMEL = 8 * 2**20
"""Elements of a bucket that is cut by size, unless the configuration says less: enough buckets to overlap with
backward, few enough that their number does not show (32 MiB of fp32; DDP uses 25 MiB)."""

MIN_UNIT_NUMEL = 2**20
"""Smaller neighbouring modules share a unit at stage 3."""


@dataclass
class Limits:
    """Sizes in elements, from `zero_optimization`."""

    bucket_numel: int = MAX_BUCKET_NUMEL
    persist_numel: int = 100_000
    persist_total_numel: int = 2**63
    max_unit_numel: int = 250_000_000


@dataclass
class Built:
    """A model under ZeRO: every bucket, those that train with their masters, and who uses which sharded bucket."""

    buckets: list[Bucket] = field(default_factory=list)
    masters: list[Master] = field(default_factory=list)
    sharded: list[Bucket] = field(default_factory=list)
    users: dict[nn.Module, list[Bucket]] = field(default_factory=dict)
    builder: Builder = field(init=False)
    """Makes further buckets, for parameters that begin to train later (see zero.join)."""

    def close(self) -> None:
        """The engine ends: nothing is made any more, and no cycle is left to a collector."""
        vars(self).pop("builder", None)


def build(
    module: nn.Module, group_of: MutableMapping[nn.Parameter, int], placing: Placing, mesh: Mesh, limits: Limits
) -> Built:
    """Lay the parameters of `module` into buckets. `group_of` gives each optimized parameter its group.

    Parameters change dtype, device and memory but not identity. Collective. Raises DeepSpeedConfigError for parameters
    without values (meta device).
    """
    named = {param: name for name, param in module.named_parameters()}
    for param, name in named.items():
        if param.is_meta:
            raise DeepSpeedConfigError(
                f"{name} has no values (it is on the meta device).\n"
                "  Load or initialise the model first (module.to_empty(device=...)), or build it under deepspeed.zero.Init()."
            )
    builder = Builder(group_of, placing, mesh, limits)
    for param in [param for param in named if not param.is_floating_point()]:
        builder.place(param, named.pop(param))
    trained = {param: name for param, name in named.items() if param.requires_grad and param in group_of}
    if placing.policy.parameters.is_sharded:
        resident, units = choose_units(module, named, limits)
        builder.fill_by_size({p: n for p, n in resident.items() if p in trained})
        builder.fill_by_size({p: n for p, n in resident.items() if p not in trained})
        _fill_units(builder, module, units, trained)
        for param in resident:
            param.__class__ = ZeroParameter
    else:
        builder.fill_by_size(trained)
        for param, name in named.items():
            if param not in trained:
                builder.place(param, name)
    builder.place_buffers(module)
    return builder.built


def choose_units(
    module: nn.Module, named: Mapping[nn.Parameter, str], limits: Limits
) -> tuple[dict[nn.Parameter, str], list[Unit]]:
    """Split parameters into those that stay whole on every rank and units of those that are sharded."""
    resident: dict[nn.Parameter, str] = {}
    total = 0
    for param, name in named.items():
        numel = full_numel(param)
        if numel <= limits.persist_numel and total + numel <= limits.persist_total_numel:
            resident[param] = name
            total += numel
    wanted = {param: name for param, name in named.items() if param not in resident}
    return resident, cut_by_module(module, wanted, min_numel=MIN_UNIT_NUMEL, max_numel=limits.max_unit_numel)


def _fill_units(
    builder: Builder, module: nn.Module, units: Sequence[Unit], trained: Mapping[nn.Parameter, str]
) -> None:
    buckets_of_unit: list[list[Bucket]] = []
    for unit in units:
        kinds = ([p for p in unit.params if p[1] in trained], [p for p in unit.params if p[1] not in trained])
        made = [builder.make([(p, n) for n, p in kind], is_sharded=True) for kind in kinds if kind]
        buckets_of_unit.append(made)
    for user, indices in users_of(module, units).items():
        builder.built.users[user] = [bucket for i in indices for bucket in buckets_of_unit[i]]


class Builder:
    """Makes buckets one at a time and keeps count of them. `group_of` is the optimizer group of each parameter that has
    one, frozen ones too."""

    def __init__(
        self, group_of: MutableMapping[nn.Parameter, int], placing: Placing, mesh: Mesh, limits: Limits
    ) -> None:
        self.built = Built()
        self.built.builder = self
        self.group_of, self.placing, self._limits = group_of, placing, limits
        self._policy, self._device = placing.policy, placing.device
        self._loads = LoadQueue()
        device = placing.device
        self._exchange = {purpose: mesh.exchange(SHARD_DIMS, purpose, device) for purpose in ("reduce", "gather")}
        self._near = mesh.exchange("near", "gather", device) if mesh.size("near") > 1 else None
        self.everyone = mesh.exchange("average", "build", device)

    def fill_by_size(self, params: Mapping[nn.Parameter, str]) -> None:
        """Buckets in reverse order of registration, which is about the order in which gradients arrive."""
        backwards = list(params.items())[::-1]
        for chunk in cut_by_size([full_numel(param) for param, _ in backwards], self._limits.bucket_numel):
            self.make([backwards[i] for i in chunk], is_sharded=False)

    def make(self, named: Sequence[tuple[nn.Parameter, str]], *, is_sharded: bool) -> Bucket:
        """Lay parameters into a new bucket, in the policy's dtype, with the first rank's values; shard it."""
        trains = named[0][0].requires_grad and named[0][0] in self.group_of
        groups = [self.group_of[param] if trains else -1 for param, _ in named]
        order = group_neighbours(groups)
        params = [named[i][0] for i in order]
        shapes = [full_shape(param) for param in params]
        sources = [slot_of(param) for param in params]
        exchange = self._exchange["gather" if is_sharded else "reduce"]
        layout = BucketLayout(
            tuple(shape.numel() for shape in shapes), tuple(groups[i] for i in order), exchange.world_size
        )
        places = self.placing.decide(layout.shard_numel, is_sharded=is_sharded, trains=trains)
        bucket = Bucket(
            len(self.built.sharded) if is_sharded else -1,
            params,
            [named[i][1] for i in order],
            shapes,
            layout,
            is_sharded=is_sharded,
            dtype=self._policy.parameters.dtype,
            device=self._device,
            exchange=exchange,
            secondary=self._near if is_sharded else None,
            rest=self.placing.params(places.params, layout.shard_numel) if is_sharded else None,
            loads=self._loads,
        )
        source = self._fill(bucket, sources)
        bucket.adopt()
        self.built.buckets.append(bucket)
        if trains:
            self.built.masters.append(Master(bucket, self._policy, source, places, self.placing))
        if is_sharded:
            self.built.sharded.append(bucket)
            bucket.reshard()
        return bucket

    def _fill(self, bucket: Bucket, sources: Sequence[Slot | None]) -> Tensor | None:
        """Write the full values; returns them in the master dtype where that is wider than the parameters'."""
        master_dtype = self._policy.optimizer.dtype
        is_exact = all(param.dtype == bucket.dtype for param in bucket.params) or master_dtype == bucket.dtype
        flat = bucket.full if is_exact else torch.zeros_like(bucket.full, dtype=master_dtype)
        _copy_values(bucket.params, sources, bucket.split(flat))
        if not all(sources):
            self.everyone.broadcast(flat)
        if flat is bucket.full:
            return None
        bucket.full.copy_(flat)
        return flat

    def place(self, param: nn.Parameter, name: str) -> None:
        """A parameter that does not train and is not sharded: cast, moved, with the first rank's values."""
        dtype = self._policy.parameters.dtype if param.is_floating_point() else param.dtype
        source = param.__dict__.pop("_zero_slot", None)
        if source is None:
            param.data = spread(self.everyone, param.data.to(self._device, dtype), self._device)
            return
        value = torch.empty(source.bucket.shapes[source.index], dtype=dtype, device=self._device)
        _copy_values([param], [source], [value])
        param.__class__ = nn.Parameter
        param.data = value

    def place_buffers(self, module: nn.Module) -> None:
        """Move buffers to the device and give every rank the first rank's values; their dtype is the engine's concern.

        Raises DeepSpeedConfigError for a buffer without values (meta device).
        """
        placed: dict[Tensor, Tensor] = {}
        for owner_name, owner in module.named_modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if buffer.is_meta:
                    raise DeepSpeedConfigError(
                        f"the buffer {owner_name}{'.' if owner_name else ''}{name} has no values (it is on the meta device).\n"
                        "  Load or initialise the model first: module.to_empty(device=...), then give its buffers their values."
                    )
                if buffer not in placed:  # one that two modules share stays one
                    placed[buffer] = spread(self.everyone, buffer.to(self._device), self._device)
                if placed[buffer] is not buffer:
                    owner._buffers[name] = placed[buffer]


def _copy_values(params: Sequence[nn.Parameter], sources: Sequence[Slot | None], into: Sequence[Tensor]) -> None:
    """Copy full values, gathering sharded ones one bucket at a time. The buckets they came from forget them.

    The caller has given the parameters new slots; `sources` are those they had.
    """
    by_bucket: dict[Bucket | None, list[int]] = {}
    for i, source in enumerate(sources):
        by_bucket.setdefault(source.bucket if source else None, []).append(i)
    for bucket, members in by_bucket.items():
        if bucket is not None:
            bucket.unshard()
        torch._foreach_copy_([into[i] for i in members], [params[i].detach() for i in members])
        if bucket is not None:
            bucket.forget_moved()
            bucket.reshard()
