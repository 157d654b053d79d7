"""The bucket: parameters that travel together, laid end to end in one flat space.

Made by `zero.build` and `zero.init`; the gatherer unshards and reshards it, the reducer lays its gradients, the
optimizer steps its shard. What a stage or a tier changes is only which of its memories exist.

    full    [world_size * S]  every rank's slices; parameters are views of it      (storage comes and goes if sharded)
    rest    [S]               this rank's slice: own memory or a file if sharded, else a view of `full`

Note [Storage resize and autograd]
    `full` is one tensor object for life (but for `leave_full`). Unsharding resizes its storage up and the all-gather lands in place;
    resharding resizes it to zero. Views that autograd saved (`weight.t()`, an expanded bias) share the storage and are
    valid again when it is back, so nothing of torch needs patching. A parameter itself is a leaf: autograd saves the
    object, not its data, so `param.data` may be an empty tensor in between. Writing through `full` does not touch the
    parameters' version counters, which is what lets a gather happen between forward and backward.

Invariant: outside of `unshard` and `reshard` nobody sets `param.data` of a bucket's parameters.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.mesh.shape import Role
from deepspeed.tiers import InMemory, Rest
from deepspeed.tiers.buffers import HUGE_PAGE, ask_for_huge_pages, at_page, page_storage
from deepspeed.utils.errors import ShardError, TrainingStateError
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.loads import Filling, KeptMemory, LoadQueue
from deepspeed.zero.modes import plain_modes
from deepspeed.zero.param import DATA, ShardedParameter, Slot, ZeroParameter, slot_of
from deepspeed.zero.space import FlatSpace
from deepspeed.zero.written import Written, keep_written

ALL = 0
"""In place of a parameter's `id`, for those who need all of a bucket's."""


def is_view(param: Tensor, view: Tensor) -> bool:
    """Whether a parameter is this very view."""
    return (
        param.data_ptr() == view.data_ptr()
        and (param.dtype, param.device) == (view.dtype, view.device)
        and (param.shape, param.stride()) == (view.shape, view.stride())
    )


def num_views(bucket: Bucket) -> int:
    """Tensors that share the memory of a bucket's `full`."""
    return torch._C._storage_Use_Count(bucket.full.untyped_storage()._cdata)


class BucketState(enum.Enum):
    """What a bucket's parameters are at the moment."""

    SHARDED = "sharded"
    """`full` has no storage; parameters are empty `ShardedParameter`s."""
    GATHERING = "gathering"
    """`full` has storage that an all-gather is filling; parameters are still empty."""
    UNSHARDED = "unsharded"
    """Parameters are views of `full`; they may be used by holders (see `hold`)."""


class Bucket(FlatSpace):
    """Parameters of one dtype, one `requires_grad` and one set of reduction dims, in one flat space.

    `params[i]` has full shape `shapes[i]` and covers `layout.starts[i]` onwards. A bucket is made with the parameters
    full (`adopt`) or already cut (`zero.init` regroups those one bucket at a time).
    """

    on_gradient_missed: Callable[[str], None] | None = None
    """While gradients are slices on the ranks: told the name of a parameter whose `grad` is asked for (see zero.veil)."""

    def __init__(
        self,
        index: int,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        shapes: Sequence[torch.Size],
        layout: BucketLayout,
        *,
        is_sharded: bool,
        dtype: torch.dtype,
        device: torch.device,
        exchange: Exchange,
        over: Role = "shard",
        gathers: Exchange | None = None,
        rest: Rest | None = None,
        loads: LoadQueue | None = None,
    ) -> None:
        super().__init__(params, names, shapes, layout, exchange.rank, over)
        self.index = index
        self.dtype = dtype
        self.exchange = exchange
        self.gathers = gathers or exchange
        """How a step's gathers go, where that is another way: what it delivers may be rounded to what the wire carries."""
        self.is_sharded = is_sharded
        self.state = BucketState.UNSHARDED
        self.is_away = False
        """Whether `engine.offload_states` has put the values away."""
        self.use_around: Callable[..., None] | None = None
        """Has the bucket unsharded around the calls of one more module, while an engine drives it (see zero.hooks)."""
        self.num_updates = 0
        """How often the values were changed; a graph made before cannot be differentiated after."""
        self.holders = 0
        """How many module calls and gather contexts need the parameters unsharded right now."""
        self._held: Counter[int] = Counter()
        """By `id`: parameters that holders asked for by themselves, and ALL. A bucket of many small modules is held a piece at a time."""
        self.full = _make_full(layout.padded_numel, dtype, device, is_read=rest is not None and rest.device is None)
        self.full.zero_()
        self.views = self.split(self.full)
        own = self.own_slice(self.full)
        # With one shard there is nothing to gather: the shard is the full buffer and its storage stays.
        self.keeps_storage = not is_sharded or (exchange.world_size == 1 and rest is None)
        """Whether `full` has its memory, with the values of all ranks, at all times."""
        self.rest: Rest = rest or InMemory(own if self.keeps_storage else torch.zeros_like(own))
        """Where this rank's slice is between uses."""
        self.loads = loads or LoadQueue()
        self.written = Written([param._version for param in self.params])
        """What modules write into the parameters while they run."""
        self._gathering: Pending | Filling | None = None
        """The all-gather that fills `full`, until it was waited for."""
        self.gathered_by = exchange
        """By what `full` was filled last."""
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        for i, param in enumerate(self.params):
            param._zero_slot = Slot(self, i)  # type: ignore[attr-defined]

    def _empty_like(self, view: Tensor) -> Tensor:
        return view.new_empty(0) if view.is_complex() else self._nothing

    @property
    def shard(self) -> Tensor:
        """This rank's slice [S]: the bytes themselves where they are in memory, on the nvme tier a copy read now."""
        view = self.rest.view(0, self.layout.shard_numel)
        if view is None:
            view = torch.empty(self.layout.shard_numel, dtype=self.dtype)
            self.rest.start_load(0, view).wait()
        return view

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part at rest, on whatever tier."""
        return (self.layout.padded_numel if not self.is_sharded else self.layout.shard_numel) * self.dtype.itemsize

    @property
    def unsharded_nbytes(self) -> int:
        """Bytes that are here only while the parameters are unsharded."""
        return 0 if self.keeps_storage else self.full.untyped_storage().nbytes()

    def view_of(self, param: nn.Parameter) -> Tensor:
        """The view of `full` that is this parameter's memory."""
        return next(view for other, view in zip(self.params, self.views, strict=True) if other is param)

    @property
    def is_unsharded(self) -> bool:
        """Whether the parameters may be used now."""
        return self.state is BucketState.UNSHARDED

    @property
    def has_full(self) -> bool:
        """Whether `full` has the values of all ranks now; finishes a gather that is under way."""
        if self.state is BucketState.GATHERING:
            self.finish_unshard()
        return self.is_unsharded and not self.is_away

    def adopt(self) -> None:
        """Point the parameters at `full`, whose values the caller has written, and take the shard from it."""
        for param, view in zip(self.params, self.views, strict=True):
            if self.is_sharded or isinstance(param, ZeroParameter):
                param.__class__ = ZeroParameter if self.is_sharded else nn.Parameter
            param.data = view
        self.write_shard()

    def write_shard(self) -> None:
        """Take this rank's shard from the full values, after somebody changed those in place."""
        if not self.keeps_storage:
            self.rest.start_store(0, self.own_slice(self.full)).wait()
        self._invalidate()

    def assigned(self) -> list[tuple[int, Tensor]]:
        """(place of a parameter, a copy of its values) of those that were assigned (`param.data = x`) rather than written in
        place. Raises ShardError for values of another shape."""
        self._set_class(ZeroParameter)
        pairs = zip(self.params, self.views, strict=True)
        found = [(i, param, view) for i, (param, view) in enumerate(pairs) if not is_view(param, view)]
        for _, param, view in found:
            if param.shape != view.shape:
                raise ShardError(
                    f"{self.name_of(param)} was given data of shape {tuple(param.shape)}; its shape is {tuple(view.shape)}.\n"
                    "  To change a parameter's shape, replace the parameter in its module before deepspeed.initialize."
                )
        return [(i, param.data.clone()) for i, param, _ in found]

    def take_assigned(self, assigned: Sequence[tuple[int, Tensor]]) -> None:
        """Take over what `assigned` found. The values of several buckets are copied before any is taken over: they may be
        views of each other's memory, as after a swap."""
        for i, values in assigned:
            self.views[i].copy_(values)
            self.params[i].data = self.views[i]
        if self.holders == 0:
            self._set_class(ShardedParameter)

    def leave_memory(self) -> None:
        """Have other memory, with the same values, which are all here. Who kept views of the old one, as a script does that
        assigns other values for a while (`backup = param.data`), finds there what it was."""
        before, self.full = self.views, self.full.clone()
        every = self.split(self.full)
        self.views = [every[slot.index] for param in self.params if (slot := slot_of(param))]
        if self.keeps_storage and isinstance(self.rest, InMemory):
            self.rest.tensor = self.own_slice(self.full)
        aliases = self.aliases[:]
        self.aliases.clear()
        for param, old, new in zip(self.params, before, self.views, strict=True):
            if is_view(param, old):
                param.data = new
                for alias in aliases:
                    if alias.param is param:
                        self.aliases.append(alias.moved_to(new))

    def forget_moved(self) -> None:
        """Let go of the parameters that another bucket has taken over (see zero.build); the others stay."""
        pairs = zip(self.params, self.views, strict=True)
        kept = [(param, view) for param, view in pairs if (slot := slot_of(param)) and slot.bucket is self]
        self.keep([param for param, _ in kept])
        self.views = [view for _, view in kept]
        if not kept:
            self.rest.release()

    def shard_changed(self) -> None:
        """The optimizer is about to write the shard: copies made of it are stale. On every rank."""
        self._invalidate()
        self.num_updates += 1

    def _invalidate(self) -> None:
        self.exchange.invalidate()
        self.gathers.invalidate()

    def set_away(self, is_away: bool) -> None:
        """The values are about to be put away, or are back (see zero.away); the bucket is sharded or replicated."""
        if is_away:
            self.reshard(keeps_written=True)
        if not self.is_sharded and is_away != self.is_away:
            for param, view in zip(self.params, self.views, strict=True):
                param.data = self._empty_like(view) if is_away else view
            self.aliases[:] = [
                alias.replaced(self._nothing) if is_away else alias.moved_to(self.view_of(alias.param))
                for alias in self.aliases
            ]
        self.is_away = is_away

    def start_unshard(self) -> None:
        """Start the all-gather of the exact parameters; a no-op if those are here. Collective: every rank, same order."""
        if self.state is BucketState.SHARDED or self.gathered_by is not self.exchange:
            self.regather(self.exchange)

    def regather(self, by: Exchange | None = None) -> None:
        """Start the all-gather whatever the state, to keep step with other ranks (see zero.gather); as a step does it, or
        `by` another exchange."""
        if self.is_away:
            raise TrainingStateError(
                f"{self.names[0]} and others were put away by engine.offload_states.\n  Call engine.reload_states() first."
            )
        if self._gathering is not None:
            self.finish_unshard()
        if not self.keeps_storage:
            _refill(self)
            exchange = self.gathered_by = by or self.gathers
            slices = self.rest.tensor
            if not exchange.needs_shard:
                self._gathering = exchange.start_all_gather(self.full)
            elif slices is not None and slices.device == self.full.device and not self.loads.fillings:
                # As nearly always: nothing to wait for, and nobody to wait behind.
                self._gathering = exchange.start_all_gather(self.full, slices)
            else:
                self._gathering = self.loads.start(self.rest, self.full, self.own_slice(self.full), exchange)
        if self.state is BucketState.SHARDED:
            self.state = BucketState.GATHERING

    def finish_unshard(self) -> None:
        """Wait for the all-gather and make the parameters usable."""
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            gathering.wait()
        if self.state is BucketState.GATHERING:
            self._set_class(ZeroParameter)
            with torch._C.DisableTorchFunctionSubclass():
                for param, view in zip(self.params, self.views, strict=True):
                    DATA.__set__(param, view)
            self.state = BucketState.UNSHARDED
            if self.gathered_by is not self.exchange:  # in fewer bits, maybe: what is here is no proof
                self.written.versions, self.written.may_be = [param._version for param in self.params], {}
            if self._held[ALL] == 0:
                self._notice_unheld()

    def unshard(self) -> None:
        """Make the parameters usable, now and until `reshard`. Collective if they are sharded."""
        self.start_unshard()
        self.finish_unshard()
        self._set_class(ZeroParameter)
        self.loads.raise_failure()

    def hold(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """One more user, of `params` or of all; while there are users the values stay, and what they hold may be used freely."""
        self.holders += 1
        if params is None:
            self._held[ALL] += 1
            if self._held[ALL] == 1 and self.is_unsharded:
                self._set_class(ZeroParameter)
        elif self.is_sharded:
            self._held.update(map(id, params))
            if self.is_unsharded:
                for param in params:
                    param.__class__ = ZeroParameter

    def unhold(self, params: Sequence[nn.Parameter] | None = None) -> None:
        """One user less. Without any, values may still be here for the next one, but a use of them is noticed."""
        self.holders -= 1
        if params is None:
            self._held[ALL] -= 1
            if self._held[ALL] == 0 and self.is_unsharded:
                self._notice_unheld()
        elif self.is_sharded:
            self._held.subtract(map(id, params))
            if self._held[ALL] == 0 and self.is_unsharded:
                for param in params:
                    if not self._held[id(param)]:
                        param.__class__ = ShardedParameter

    def _notice_unheld(self) -> None:
        self._set_class(ShardedParameter)
        if self.is_sharded and self.holders:
            for param in self.params:
                if self._held[id(param)]:
                    param.__class__ = ZeroParameter

    def _set_class(self, kind: type[nn.Parameter]) -> None:
        if self.is_sharded:
            for param in self.params:
                param.__class__ = kind

    def reshard(self, *, keeps_written: bool = False) -> None:
        """Drop the full values; changes made to them are lost unless `write_shard` took them.

        keeps_written: what a module's own code has changed meanwhile stays, as in plain PyTorch: weights that are clamped in `forward`,
        `nn.Embedding(max_norm=...)`, hooks that write.
        """
        if not self.is_sharded or self.state is BucketState.SHARDED:
            return
        if self.state is BucketState.GATHERING or self._gathering is not None:
            self.finish_unshard()
        else:
            with torch._C.DisableTorchFunctionSubclass():
                versions = [param._version for param in self.params]
            if keeps_written and (self.written.may_be or versions != self.written.versions):
                keep_written(self, versions)
            self.written.versions = versions  # what contexts write is theirs
        self.written.may_be.clear()
        self._set_class(ZeroParameter)  # the sharded class refuses `.data`
        with torch._C.DisableTorchFunctionSubclass():
            for param, view in zip(self.params, self.views, strict=True):
                DATA.__set__(param, self._empty_like(view))
        self._set_class(ShardedParameter)
        if not self.keeps_storage:
            storage, memory = self.full.untyped_storage(), _kept_memory(self)
            if not can_be_given_up(storage):
                self.leave_full()
            elif memory is not None and storage.nbytes():
                memory.give_back(self.full)
                self.leave_full()
            self.full.untyped_storage().resize_(0)
        self.state = BucketState.SHARDED

    def leave_full(self) -> None:
        """Before `reshard`: leave the memory of `full` to those who kept views of it (a state dict made inside a gather, a
        parameter made from another), and have another for the next time. Resharding would take theirs away."""
        if not self.keeps_storage:
            with plain_modes():
                self.full = _make_full(
                    self.layout.padded_numel, self.dtype, self.full.device, is_read=self.rest.device is None
                )
                self.views = self.split(self.full)

    def publish(self) -> Pending | None:
        """Start giving every rank the shards that the optimizer wrote; None where nothing has to move."""
        if self.is_sharded or self.exchange.world_size == 1:
            return None
        return self.exchange.start_all_gather(self.full, None)

    def release(self) -> None:
        """Forget the parameters, which keep what they hold: plain tensors if unsharded."""
        for param in self.params:
            if type(param) in (ZeroParameter, ShardedParameter):
                param.__class__ = nn.Parameter
            del param._zero_slot  # type: ignore[attr-defined]
        self.params.clear()

    def __repr__(self) -> str:
        first = self.names[0] if self.names else "-"
        kind = "sharded" if self.is_sharded else "replicated"
        return f"Bucket({self.index}, {kind}, {len(self.names)} parameters from {first}, {self.layout.numel} elements)"


def _make_full(numel: int, dtype: torch.dtype, device: torch.device, is_read: bool) -> Tensor:
    """[numel], uninitialised; `is_read`: a part of it will be read from a file."""
    if is_read and device.type == "cpu":
        return at_page(page_storage(numel * dtype.itemsize), numel, dtype)
    return torch.empty(numel, dtype=dtype, device=device)


def can_be_given_up(storage: torch.UntypedStorage) -> bool:
    """Whether a storage can lose its memory and get other. One that `numpy()` has pinned cannot; nor can one that a script has moved
    into shared memory (`share_memory_()`), though torch says that it can: it would end in a segmentation fault."""
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _kept_memory(bucket: Bucket) -> KeptMemory | None:
    """Where `full` takes memory that others left, and leaves its own; None where something else views it, or nothing is kept."""
    if bucket.loads.memory is None or bucket.rest.device is not None or bucket.full.device.type != "cpu":
        return None
    return bucket.loads.memory if num_views(bucket) == len(bucket.views) + 2 else None


def _refill(bucket: Bucket) -> None:
    """Give `full` memory, if it has none; what is in it is undefined."""
    full, memory = bucket.full, _kept_memory(bucket)
    if memory is not None and not full.untyped_storage().nbytes():
        with plain_modes():
            bucket.full = memory.take(full.numel(), bucket.dtype)
            bucket.views = bucket.split(bucket.full)
        return
    full.untyped_storage().resize_(int(full.storage_offset()) * full.itemsize + full.nbytes)
    if full.nbytes >= HUGE_PAGE and full.device.type == "cpu":
        ask_for_huge_pages(full)
