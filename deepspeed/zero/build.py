"""From a plan to buckets: made, filled and sharded, one at a time, as `zero.plan` says.

Called once by the engine. The model may be plain, or already sharded by `zero.Init` or an earlier engine; either way
at most one bucket is whole at a time beyond what the policy keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepspeed.comm.exchange import Exchange
from deepspeed.comm.relay import Relay
from deepspeed.comm.spread import spread
from deepspeed.mesh import Mesh, marks
from deepspeed.mesh.shape import Role
from deepspeed.tiers import Rest
from deepspeed.tiers.buffers import give_memory_back
from deepspeed.tiers.int8_rest import Int8Rest
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.aliases import Alias
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gather_exchanges import GatherExchanges
from deepspeed.zero.loads import LoadQueue
from deepspeed.zero.master import Master
from deepspeed.zero.param import Slot, ZeroParameter, real_dtype, slot_of
from deepspeed.zero.placing import Placing
from deepspeed.zero.plan import BucketPlan, Limits, Named, chunks_by_size, plan_bucket, plan_model

_DROPPED_NBYTES = 16 << 20
"""After how many bytes of buckets that were filled and dropped the allocator is asked to give memory back."""


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
    module: nn.Module,
    group_of: MutableMapping[nn.Parameter, int],
    placing: Placing,
    mesh: Mesh,
    limits: Limits,
    gathers: GatherExchanges | None = None,
    aliases: Sequence[Alias] = (),
) -> Built:
    """Lay the parameters of `module` into buckets. `group_of` gives each optimized parameter its group; `aliases` are buffers
    that lie in parameters.

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
    _check_dtypes(named, group_of, placing)
    builder = Builder(group_of, placing, mesh, limits, gathers or GatherExchanges())
    plan = plan_model(module, group_of, placing, limits, mesh.size("shard"), mesh.size("expert_shard"))
    made = [builder.execute(planned) for planned in plan.buckets]
    builder.built.users = {user: [made[i] for i in used] for user, used in plan.users.items()}
    for param in plan.resident:
        param.__class__ = ZeroParameter
    for param, name in plan.loose:
        builder.place(param, name)
    builder.place_buffers(module, [buffer for alias in aliases if (buffer := builder.follow(alias)) is not None])
    return builder.built


def _check_dtypes(named: Mapping[nn.Parameter, str], group_of: Mapping[nn.Parameter, int], placing: Placing) -> None:
    """Refuse complex parameters that cannot keep their width, and tell of float64 ones that take on another dtype."""
    for param, name in named.items():
        if param.is_complex() and param in group_of and real_dtype(param) != placing.policy.parameters.dtype:
            raise DeepSpeedConfigError(
                f"{name} is complex ({_short(param.dtype)}), which cannot be trained in {_short(placing.policy.parameters.dtype)}.\n"
                "  Leave bf16 and fp16 out of the configuration and make all complex parameters of one width, or store "
                "nn.Parameter(torch.view_as_real(weight)) and compute with torch.view_as_complex(self.weight)."
            )
    dtype = placing.policy.parameters.dtype
    wide = [name for param, name in named.items() if param.dtype == torch.float64 != dtype]
    if wide:
        warn_once(
            f"{wide[0]}{f' and {len(wide) - 1} more' if wide[1:] else ''}: float64 parameters are trained in {_short(dtype)} here. "
            f"Give the model {_short(dtype)} inputs, or make all of its parameters float64."
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Builder:
    """Makes buckets one at a time and keeps count of them. `group_of` is the optimizer group of each parameter that has
    one, frozen ones too."""

    def __init__(
        self,
        group_of: MutableMapping[nn.Parameter, int],
        placing: Placing,
        mesh: Mesh,
        limits: Limits,
        gathers: GatherExchanges,
    ) -> None:
        self.built = Built()
        self.built.builder = self
        self.group_of, self.placing, self._limits = group_of, placing, limits
        roles: tuple[Role, ...] = ("shard", "expert_shard") if mesh.size("experts") > 1 else ("shard",)
        self._sizes: dict[Role, int] = {role: mesh.size(role) for role in roles}
        self._policy, self._device = placing.policy, placing.device
        self._loads = LoadQueue()
        self._nbytes_dropped = 0
        device = placing.device
        self._exchange = {(role, "reduce"): mesh.exchange(role, "reduce", device) for role in self._sizes}
        self._gathers = gathers
        # Sharded parameters are gathered after their engine's end, too.
        with mesh.opening(None) if self._policy.parameters.is_sharded else contextlib.nullcontext():
            self._exchange.update({(role, "gather"): mesh.exchange(role, "gather", device) for role in self._sizes})
            has_near = gathers.keeps_copy and mesh.size("near") > 1
            self._near = mesh.exchange("near", "gather", device) if has_near else None
        self._relay = mesh.shared("relay", lambda: _relay(mesh, device)) if gathers.quantizes_weights else None
        self.everyone = mesh.exchange("average", "build", device)
        has_spread = mesh.size("experts") > 1
        self._with_same_experts = mesh.exchange("expert_shard", "build", device) if has_spread else self.everyone

    def fill_by_size(self, params: Mapping[nn.Parameter, str]) -> None:
        """Make whole buckets of further parameters."""
        for chunk in chunks_by_size(list(params.items()), self._limits):
            self.make(chunk, is_sharded=False)

    def make(self, named: Named, *, is_sharded: bool) -> Bucket:
        """Make one bucket of further parameters."""
        return self.execute(plan_bucket(named, self.group_of, self.placing, self._sizes, is_sharded=is_sharded))

    def execute(self, plan: BucketPlan) -> Bucket:
        """Lay the plan's parameters into a bucket, in the policy's dtype, with the first rank's values; shard it."""
        sources = [slot_of(param) for param in plan.params]
        is_sharded, layout = plan.is_sharded, plan.layout
        exact, gathers = self._exchanges_of(plan)
        bucket = Bucket(
            len(self.built.sharded) if is_sharded else -1,
            list(plan.params),
            list(plan.names),
            list(plan.shapes),
            layout,
            is_sharded=is_sharded,
            dtype=self._policy.parameters.dtype,
            device=self._device,
            exchange=exact,
            over=plan.over,
            gathers=gathers,
            rest=self._rest_of(plan),
            loads=self._loads,
        )
        source = self._fill(bucket, sources)
        bucket.adopt()
        self.built.buckets.append(bucket)
        if plan.trains:
            self.built.masters.append(Master(bucket, self._policy, source, plan.places, self.placing))
        if is_sharded:
            self.built.sharded.append(bucket)
            bucket.reshard()
            self._give_back(bucket)
        return bucket

    def _give_back(self, bucket: Bucket) -> None:
        """What buckets that rest on a disk took while they were filled, from time to time."""
        if bucket.rest.device is None and self._device.type == "cpu":
            self._nbytes_dropped += bucket.layout.padded_numel * bucket.dtype.itemsize
            if self._nbytes_dropped >= _DROPPED_NBYTES:
                self._nbytes_dropped = 0
                give_memory_back()

    def _rest_of(self, plan: BucketPlan) -> Rest | None:
        """Where a sharded bucket's own slice is between uses, if not in the device's memory as it is."""
        if not plan.is_sharded:
            return None
        dtype = self._policy.parameters.dtype
        if self._gathers.quantizes_frozen and not plan.trains and dtype.itemsize < 8:
            return Int8Rest(plan.layout.shard_numel, dtype, self._device)
        return self.placing.params(plan.places.params, plan.layout.shard_numel)

    def _exchanges_of(self, plan: BucketPlan) -> tuple[Exchange, Exchange | None]:
        """How one bucket's parameters are gathered, exactly and in a step."""
        if not plan.is_sharded:
            return self._exchange[plan.over, "reduce"], None
        # Experts are shared by other ranks, which are not near and far.
        near, relay = (self._near, self._relay) if plan.over == "shard" else (None, None)
        return self._gathers.exchanges(self._exchange[plan.over, "gather"], near, relay)

    def _fill(self, bucket: Bucket, sources: Sequence[Slot | None]) -> Tensor | None:
        """Write the full values; returns them in the master dtype where that is wider than the parameters'."""
        master_dtype = self._policy.optimizer.dtype
        is_exact = all(real_dtype(param) == bucket.dtype for param in bucket.params) or master_dtype == bucket.dtype
        flat = bucket.full if is_exact else torch.zeros_like(bucket.full, dtype=master_dtype)
        _copy_values(bucket.params, sources, bucket.split(flat))
        if not all(sources):
            self.those_with(bucket.params[0]).broadcast(flat)
        if flat is bucket.full:
            return None
        bucket.full.copy_(flat)
        return flat

    def those_with(self, param: nn.Parameter) -> Exchange:
        """Between the ranks that have the same parameter, for its first values."""
        return self._with_same_experts if marks.of(param).is_expert else self.everyone

    def place(self, param: nn.Parameter, name: str) -> None:
        """A parameter that does not train and is not sharded: cast, moved, with the first rank's values."""
        dtype = self._policy.parameters.dtype if param.is_floating_point() else param.dtype
        source = param.__dict__.pop("_zero_slot", None)
        if source is None:
            param.data = spread(self.those_with(param), param.data.to(self._device, dtype), self._device)
            return
        value = torch.empty(source.bucket.shapes[source.index], dtype=dtype, device=self._device)
        _copy_values([param], [source], [value])
        param.__class__ = nn.Parameter
        param.data = value

    def follow(self, alias: Alias) -> Tensor | None:
        """Have a buffer be a view of the bucket that its parameter is in now; the buffer. None for one that is by itself.

        Raises DeepSpeedConfigError for one that would have to follow a parameter that trains, and cannot.
        """
        slot = slot_of(alias.param)
        if slot is None:
            return None
        bucket = slot.bucket
        if alias.is_registered and alias.fits and bucket.keeps_storage and bucket.dtype == alias.buffer.dtype:
            bucket.aliases.append(alias.moved_to(bucket.views[slot.index]))
            return bucket.aliases[-1].buffer
        if alias.param in self.group_of:
            alias.refuse(bucket.dtype, is_whole=bucket.keeps_storage)
        return None

    def place_buffers(self, module: nn.Module, aliases: Iterable[Tensor]) -> None:
        """Move buffers to the device and give every rank the first rank's values; their dtype is the engine's concern, and
        `aliases` have their place.

        Raises DeepSpeedConfigError for a buffer without values (meta device).
        """
        placed = {alias: alias for alias in aliases}
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


def _relay(mesh: Mesh, device: torch.device) -> Relay | None:
    """Two hops for gathers, where there are several nodes of several ranks. Collective over the job."""
    if mesh.size("near") == 1 or mesh.size("far") == 1:
        return None
    return Relay(mesh.exchange("near", "relay", device), mesh.exchange("far", "relay", device))


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


def make_plain(param: nn.Parameter) -> None:
    """Take a parameter that `zero.Init` sharded out of its bucket: a plain one again, with all its values. Collective over
    the ranks that share it; nothing for one that is plain already."""
    source = param.__dict__.pop("_zero_slot", None)
    if source is None:
        return
    value = torch.empty(source.bucket.shapes[source.index], dtype=source.bucket.dtype, device=source.bucket.full.device)
    _copy_values([param], [source], [value])
    param.__class__ = nn.Parameter
    param.data = value
