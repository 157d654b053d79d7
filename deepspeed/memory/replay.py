"""An engine's memory, played to a traced step: the same verbs as ZeRO's, on a ledger instead of tensors.

Called by `memory.estimator` with a trace (what the model does), a plan (its buckets) and an engine's settings. Gathering is
decided by the real `zero.gather.Gatherer`; reductions, the update and publication follow `zero.reduce` and
`zero.optimizer`, each with a short counterpart here that says what it borrows and when it gives it back.

    initialize    parameters are laid into buckets, one at a time; masters
    forward       gathers come and go (stage 3); activations grow
    backward      gradients arrive, are laid into flat buffers, and reduced; recomputation
    step          gradients in the master dtype; moments exist from the first step on

How many reductions are on the wire at once depends on the speed of the network. The most that the reducer allows is
predicted (`zero.reduce.MAX_IN_FLIGHT`); where parameters are sharded it allows any number, and `LIKELY_IN_FLIGHT` is.
With one at a time (`EngineSettings.max_in_flight`) the replay gives what a network that is never waited for comes to.

Invariant: whatever allocates in zero/, comm/exchange.py and tiers/ has its line here; `tests/memory` holds both against
the allocator of real runs.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from deepspeed.comm.direct import ONE_PHASE_NUMEL, ranks_met
from deepspeed.comm.exchange import NUM_KEPT, Pending, Shelf
from deepspeed.memory.ledger import (
    ACTIVATIONS,
    BUCKETS,
    COMMUNICATION,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    STREAMING,
    TEMPORARIES,
    UNSHARDED,
    Ledger,
)
from deepspeed.memory.sizes import SizedBucket, Sizes, sizes_of
from deepspeed.memory.trace import Trace, What
from deepspeed.zero.gather import Gatherer, PhaseKind
from deepspeed.zero.gradients import MAX_KEPT, MAX_STORING
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.placing import Placing
from deepspeed.zero.plan import ModelPlan
from deepspeed.zero.policy import Tier, ZeroPolicy
from deepspeed.zero.reduce import MAX_IN_FLIGHT, UNLIMITED, InFlight, Limit, Rounds
from deepspeed.zero.stream import NUM_SETS, tile_numel

LIKELY_IN_FLIGHT = 2
LIKELY_IN_FLIGHT_DIRECTLY = 3
"""Reductions taken to be on the wire at stage 3: one that is ending and one that was just launched; over gloo, whose
threads share the cores with the computation, one more (seen on two ranks)."""


class Given(NamedTuple):
    """A parameter of the user's model: its dtype, and where it is (None: made by `zero.Init`, in its shard)."""

    dtype: torch.dtype
    tier: Tier | None


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What of an engine decides about memory, beside its buckets. Sizes in elements unless they say bytes."""

    placing: Placing
    shard_size: int = 1
    num_replicas: int = 1
    sends_directly: bool = True
    """gloo on CPUs (`comm.direct.DirectExchange`), which receives into scratch; else a device's collectives."""
    accumulation: int = 1
    sub_group_numel: int = 10**9
    prefetch_numel: int = 50_000_000
    max_live_numel: int = 10**9
    max_reuse_distance: int = 10**9
    wire_dtype: torch.dtype = torch.float32
    state_nbytes: tuple[float, ...] = (8.0,)
    """Bytes of optimizer state per element, by parameter group; masters aside."""
    beside_nbytes: float = 0.0
    """Bytes of state per element of a whole parameter that every rank keeps, sharded or not: a 1-bit optimizer's errors."""
    given: Sequence[Given] = ()
    """What the user's model has, by position of the parameter."""
    cut_nbytes: int = 0
    """What of the user's parameters goes to other ranks before anything is built, as they share layers."""
    max_in_flight: int | None = None
    """Reductions on the wire at once; None for the most that the reducer allows, or that is likely where it has no bound."""

    @property
    def policy(self) -> ZeroPolicy:
        """The placement table."""
        return self.placing.policy

    def tier(self, tier: Tier) -> Tier:
        """Where a ledger counts bytes of a tier: device and cpu are one where the device is a CPU."""
        return Tier.DEVICE if tier is Tier.CPU and self.placing.is_host else tier


class Pool:
    """Blocks of any size kept for reuse: what `zero.gradients.FlatPool` and `comm.exchange.Scratch` do."""

    def __init__(self, ledger: Ledger, kind: str, max_kept: int) -> None:
        self._ledger, self._kind = ledger, kind
        self._shelf: Shelf[None] = Shelf(max_kept)

    def take(self, nbytes: int) -> int:
        """Lend a block; returns its size."""
        found = self._shelf.take(nbytes)
        if found is not None:
            return found[0]
        self._ledger.add(self._kind, nbytes)
        return nbytes

    def give_back(self, nbytes: int) -> None:
        """Take a block back; those that are freed for it leave the ledger."""
        for freed in self._shelf.give_back(nbytes, None):
            self._ledger.drop(self._kind, freed)


class Gathers:
    """Unshard and reshard, driven by the trace's modules as `zero.hooks.ModuleHooks` drives them."""

    def __init__(self, trace: Trace, sizes: Sizes, settings: EngineSettings) -> None:
        self._users = {trace.modules.index(module): buckets for module, buckets in sizes.users.items()}
        self._users.setdefault(0, [])
        self._gatherer = Gatherer(
            sizes.sharded,
            lambda wish, digest: lambda: [(wish, digest)] * settings.shard_size,
            prefetch_numel=settings.prefetch_numel,
            max_live_numel=settings.max_live_numel,
            max_reuse_distance=settings.max_reuse_distance,
        )
        self._frames: list[tuple[list[SizedBucket], bool]] = []
        self._held: dict[SizedBucket, None] = {}
        self._in_backward = False

    def enter(self, module: int) -> None:
        """A module's call begins."""
        if module in self._users:
            opens = not self._gatherer.in_phase
            if opens:
                self._gatherer.begin(PhaseKind.FORWARD, str(module))
            self._frames.append((self._users[module], opens))
            for bucket in self._users[module]:
                self._gatherer.request(bucket)

    def leave(self, module: int) -> None:
        """It ends."""
        if module in self._users:
            buckets, opened = self._frames.pop()
            if self._in_backward:
                self._hold([bucket for bucket in buckets if not bucket.requires_grad])
            for bucket in buckets:
                self._gatherer.release(bucket)
            if opened:
                self._gatherer.end()

    def reach_output(self, module: int) -> None:
        """Its backward begins."""
        if module in self._users:
            self.begin_backward()
            self._hold(self._users[module])

    def leave_input(self, module: int) -> None:
        """Its backward is over, as far as frozen parameters are concerned."""
        self._unhold([bucket for bucket in self._users.get(module, ()) if not bucket.requires_grad])

    def begin_backward(self) -> None:
        """The first gradient."""
        if not self._in_backward:
            self._in_backward = True
            if not self._gatherer.in_phase:
                self._gatherer.begin(PhaseKind.BACKWARD)

    def complete(self, bucket: SizedBucket) -> None:
        """All gradients of a bucket are there."""
        self._unhold([bucket])

    def end_backward(self) -> None:
        """Autograd is done."""
        self._in_backward = False
        self._unhold(list(self._held))
        self._gatherer.end()

    def before_update(self) -> None:
        """Nothing stays unsharded over an update."""
        self._gatherer.reshard_all()

    def _hold(self, buckets: list[SizedBucket]) -> None:
        for bucket in buckets:
            if bucket not in self._held:
                self._held[bucket] = None
                self._gatherer.request(bucket)

    def _unhold(self, buckets: list[SizedBucket]) -> None:
        for bucket in buckets:
            if bucket in self._held:
                del self._held[bucket]
                self._gatherer.release(bucket)
                self._gatherer.drop(bucket)


class Reductions:
    """Gradients on their way, as `zero.reduce.Reducer` takes, lays down and sends them."""

    def __init__(
        self,
        sizes: Sizes,
        settings: EngineSettings,
        ledger: Ledger,
        position_of: dict[nn.Parameter, int],
        on_complete: Callable[[SizedBucket], None],
    ) -> None:
        self._settings, self._ledger, self._on_complete = settings, ledger, on_complete
        policy = settings.policy
        self._delivers_shard = policy.optimizer.is_sharded
        self._itemsize = policy.gradients.dtype.itemsize
        self._rounds: Rounds[SizedBucket] = Rounds()
        self._rounds.add(sizes.trained)
        self._bucket_of = {
            position_of[param]: bucket for bucket in sizes.trained for param in bucket.params if param in position_of
        }
        self._missing = {bucket: len(bucket.params) for bucket in self.order}
        self._arrived: Counter[SizedBucket] = Counter()
        self._flats = Pool(ledger, BUCKETS, MAX_KEPT)
        self._scratch = Pool(ledger, COMMUNICATION, NUM_KEPT)
        self._lent: dict[SizedBucket, int] = {}
        self._storing: deque[Callable[[], None]] = deque()
        likely = LIKELY_IN_FLIGHT_DIRECTLY if settings.sends_directly else LIKELY_IN_FLIGHT
        most = settings.max_in_flight or (likely if policy.parameters.is_sharded else MAX_IN_FLIGHT)
        limit = Limit(1 if settings.shard_size == 1 else most, UNLIMITED.nbytes)
        self._in_flight: InFlight[SizedBucket] = InFlight(limit, lambda bucket: None)
        self.reduces_now = self.is_first = True
        """Whether this micro-batch is the last, and whether it is the first, of its step."""
        for bucket in self.order:
            if self._on_tier(bucket):
                ledger.add(GRADIENTS, self.result_nbytes(bucket), bucket.places.optimizer)
        self._unmapped = set(self.order)
        """Whose gradients have had no memory of their own yet: they get it in the first backward."""

    @property
    def order(self) -> list[SizedBucket]:
        """Trained buckets as they are launched."""
        return self._rounds.order

    def _on_tier(self, bucket: SizedBucket) -> bool:
        """Whether reduced gradients rest apart from the device, with the optimizer's state."""
        return self._settings.placing.is_apart(bucket.places.optimizer)

    def _is_sharded(self, bucket: SizedBucket) -> bool:
        """Whether each reduction borrows a flat buffer and leaves its result elsewhere."""
        settings = self._settings
        return settings.policy.gradients.is_sharded and (bucket.layout.world_size > 1 or self._on_tier(bucket))

    def _flat_nbytes(self, bucket: SizedBucket) -> int:
        return bucket.layout.padded_numel * self._itemsize

    def result_nbytes(self, bucket: SizedBucket) -> int:
        """Bytes of a bucket's reduced gradients on this rank."""
        layout = bucket.layout
        return (layout.shard_numel if self._delivers_shard else layout.padded_numel) * self._itemsize

    def take(self, param: int, nbytes: int) -> None:
        """A parameter's gradient arrives."""
        bucket = self._bucket_of.get(param)
        if bucket is None:
            return
        self._ledger.add(BUCKETS, nbytes)
        self._arrived[bucket] += nbytes
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._complete(bucket)

    def _complete(self, bucket: SizedBucket) -> None:
        self._on_complete(bucket)
        if not (self._is_sharded(bucket) or self.reduces_now):
            self._lay_down(bucket)
            return
        self._rounds.fill(bucket)
        for due in self._rounds.due():
            self._launch(due)

    def _map(self, bucket: SizedBucket) -> None:
        if bucket not in self._unmapped:
            return
        self._unmapped.discard(bucket)
        if not self._is_sharded(bucket):
            self._ledger.add(GRADIENTS, self._flat_nbytes(bucket))
        elif not self._on_tier(bucket):
            self._ledger.add(GRADIENTS, self.result_nbytes(bucket))

    def _lay_down(self, bucket: SizedBucket) -> None:
        if not self._is_sharded(bucket):
            self._map(bucket)
        else:
            self._lent[bucket] = self._flats.take(self._flat_nbytes(bucket))
        self._ledger.drop(BUCKETS, self._arrived.pop(bucket, 0))
        self._missing[bucket] = len(bucket.params)

    def _launch(self, bucket: SizedBucket) -> None:
        if self._missing[bucket] < len(bucket.params) or self._is_sharded(bucket):
            self._lay_down(bucket)
        self._in_flight.make_room(self._flat_nbytes(bucket))
        layout, settings = bucket.layout, self._settings
        wire = settings.wire_dtype.itemsize
        numel = layout.padded_numel
        held = [] if settings.wire_dtype == settings.policy.gradients.dtype else [numel * wire]
        if self._is_sharded(bucket) and self._on_tier(bucket) and not self.is_first:
            held.append(self.result_nbytes(bucket))  # what is already at rest comes back to be added to
        self._map(bucket)
        for nbytes in held:
            self._ledger.add(COMMUNICATION, nbytes)
        scratch = [self._scratch.take(nbytes) for nbytes in self._scratch_nbytes(bucket, wire)]
        lent = self._lent.pop(bucket, 0)  # the next micro-batch's may be on the wire before this one is delivered

        def finish() -> None:
            for nbytes in scratch:
                self._scratch.give_back(nbytes)
            for nbytes in held:
                self._ledger.drop(COMMUNICATION, nbytes)
            if self._is_sharded(bucket):
                give_back = functools.partial(self._flats.give_back, lent)
                if self._on_tier(bucket):
                    self._storing.append(give_back)
                    self._end_stores(MAX_STORING)
                else:
                    give_back()

        if layout.world_size == 1 < settings.shard_size:  # experts that no other rank has: nothing is sent
            finish()
        else:
            self._in_flight.add(bucket, Pending(finish), self._flat_nbytes(bucket))

    def _end_stores(self, num_left: int = 0) -> None:
        while len(self._storing) > num_left:
            self._storing.popleft()()

    def _scratch_nbytes(self, bucket: SizedBucket, itemsize: int) -> list[int]:
        """What a reduction receives into, beside its destination."""
        numel, size = bucket.layout.padded_numel, bucket.layout.world_size
        if size == 1:
            return []
        if not self._settings.sends_directly:
            return [numel // size * itemsize] if self._delivers_shard else []
        if not self._delivers_shard and numel <= ONE_PHASE_NUMEL:
            return [numel * itemsize] * (size - 1)
        return [max(len(ranks_met(rank, size)) for rank in range(size)) * -(-numel // size) * itemsize]

    def flush(self) -> None:
        """The end of a round: launch what is left."""
        if not any(map(self._is_sharded, self.order)) and not self.reduces_now:
            for bucket in self.order:
                if self._missing[bucket] < len(bucket.params):
                    self._lay_down(bucket)
            return
        if self._rounds.has_begun or any(self._missing[b] < len(b.params) for b in self.order):
            for bucket in self._rounds.rest():
                self._launch(bucket)
        self._rounds.end()

    def finish(self) -> None:
        """Deliver everything; the next round is in the order in which buckets filled."""
        self.flush()
        self._in_flight.end_all()
        self._end_stores()
        self._rounds.set_order(self._rounds.completion_order())


class Replay:
    """One rank's engine on a ledger. `run` plays initialization and a few steps; then `ledger` has the peaks."""

    def __init__(self, trace: Trace, plan: ModelPlan, settings: EngineSettings) -> None:
        self.trace, self.settings = trace, settings
        self.ledger = Ledger()
        self.sizes = sizes_of(plan, settings.placing, self._count_storage)
        self._position_of = {param: i for i, param in enumerate(trace.params)}
        self._has_moments = False

    def run(self, num_steps: int = 4) -> Ledger:
        """Play initialization and `num_steps` steps: the gatherer knows its order from the third on."""
        self._initialize()
        self._gathers = Gathers(self.trace, self.sizes, self.settings)
        self._reductions = Reductions(self.sizes, self.settings, self.ledger, self._position_of, self._gathers.complete)
        micro_batches = min(2, self.settings.accumulation)
        for _ in range(num_steps):
            for i in range(micro_batches):
                self._reductions.reduces_now, self._reductions.is_first = i == micro_batches - 1, i == 0
                self._micro_batch()
            self._step()
        return self.ledger

    def _count_storage(self, bucket: SizedBucket, count: int) -> None:
        nbytes = bucket.layout.padded_numel * self.settings.policy.parameters.dtype.itemsize
        self.ledger.add(UNSHARDED, nbytes, count=count)

    def _initialize(self) -> None:
        """`zero.build`: each bucket is filled from the user's parameters, which go as it is adopted."""
        ledger, policy = self.ledger, self.settings.policy
        dtype, master = policy.parameters.dtype, policy.optimizer.dtype
        given: dict[nn.Parameter, tuple[int, Tier]] = {}
        for param, i in self._position_of.items():
            is_there = i < len(self.settings.given) and self.settings.given[i].tier is not None
            nbytes = param.numel() * self.settings.given[i].dtype.itemsize if is_there else 0
            given[param] = (
                nbytes,
                self.settings.tier(self.settings.given[i].tier or Tier.DEVICE) if is_there else Tier.DEVICE,
            )
            ledger.add(PARAMETERS, *given[param])
        for buffer in self.trace.model.buffers():
            ledger.add(PARAMETERS, buffer.numel() * buffer.element_size())
        ledger.add(PARAMETERS, self.settings.cut_nbytes)
        ledger.drop(PARAMETERS, self.settings.cut_nbytes)
        for param in self.sizes.loose:
            nbytes = param.numel() * (dtype if param.is_floating_point() else param.dtype).itemsize
            if given[param] != (nbytes, Tier.DEVICE):
                ledger.add(PARAMETERS, nbytes)
                ledger.drop(PARAMETERS, *given[param])
        for bucket in self.sizes.buckets:
            layout = bucket.layout
            full = layout.padded_numel * dtype.itemsize
            shard = layout.shard_numel * dtype.itemsize
            is_exact = master == dtype or all(given[p][0] == p.numel() * dtype.itemsize for p in bucket.params)
            kind = PARAMETERS if bucket.keeps_storage else UNSHARDED
            ledger.add(kind, full)
            if not bucket.keeps_storage:
                ledger.add(PARAMETERS, shard, self.settings.tier(bucket.places.params))
            source = 0 if is_exact else layout.padded_numel * master.itemsize
            ledger.add(TEMPORARIES, source)
            for param in bucket.params:
                ledger.drop(PARAMETERS, *given[param])
            if bucket.trains and not bucket.places.is_alias:
                tier = self.settings.tier(bucket.places.optimizer)
                ledger.add(OPTIMIZER, self._master_numel(bucket) * master.itemsize, tier)
            ledger.drop(TEMPORARIES, source)
            if not bucket.keeps_storage:
                ledger.drop(UNSHARDED, full)

    def _master_numel(self, bucket: SizedBucket) -> int:
        return bucket.layout.shard_numel if self.settings.policy.optimizer.is_sharded else bucket.layout.padded_numel

    def _micro_batch(self) -> None:
        ledger, gathers, reductions = self.ledger, self._gathers, self._reductions
        kind = ACTIVATIONS
        live: dict[int, tuple[str, int]] = {}
        for what, index, nbytes in self.trace.events:
            if what is What.ALLOCATE:
                live[index] = kind, nbytes
                ledger.add(kind, nbytes)
            elif what is What.FREE:
                ledger.drop(*live.pop(index))
            elif what is What.ENTER:
                gathers.enter(index)
            elif what is What.LEAVE:
                gathers.leave(index)
            elif what is What.OUTPUT:
                gathers.reach_output(index)
            elif what is What.INPUT:
                gathers.leave_input(index)
            elif what is What.GRADIENT:
                reductions.take(index, nbytes)
            elif what is What.FORWARD:
                ledger.phase, kind = "forward", ACTIVATIONS
                reductions.flush()
            elif what is What.BACKWARD:
                ledger.phase, kind = "backward", TEMPORARIES
                gathers.begin_backward()
            else:
                gathers.end_backward()
        for entry in live.values():
            ledger.drop(*entry)

    def _step(self) -> None:
        ledger, policy, reductions = self.ledger, self.settings.policy, self._reductions
        ledger.phase = "step"
        self._gathers.before_update()
        reductions.finish()
        itemsize = policy.optimizer.dtype.itemsize
        copies = policy.gradients.dtype != policy.optimizer.dtype
        pending: list[int] = []
        numel = 0
        is_first, self._has_moments = not self._has_moments, True
        resident = [bucket for bucket in self.sizes.trained if bucket.places.optimizer is Tier.DEVICE]
        for bucket in resident:
            size = self._master_numel(bucket)
            if pending and numel + size > self.settings.sub_group_numel:
                self._release(pending)
                numel = 0
            numel += size
            if copies:
                pending.append(size * itemsize)
                ledger.add(TEMPORARIES, pending[-1])
            if is_first:
                ledger.add(OPTIMIZER, self._state_nbytes(bucket))
                ledger.add(OPTIMIZER, int(sum(bucket.layout.numels) * self.settings.beside_nbytes))
        self._release(pending)
        streamed = [bucket for bucket in self.sizes.trained if bucket.places.optimizer is not Tier.DEVICE]
        if streamed:
            self._stream(streamed, is_first)

    def _stream(self, buckets: list[SizedBucket], is_first: bool) -> None:
        """`zero.stream`: tiles of masters that rest on a tier, through three sets of buffers in main memory."""
        settings, ledger, policy = self.settings, self.ledger, self.settings.policy
        host = settings.tier(Tier.CPU)
        for bucket in buckets if is_first else ():
            ledger.add(OPTIMIZER, self._state_nbytes(bucket), settings.tier(bucket.places.optimizer))
        tile = tile_numel(settings.sub_group_numel)
        largest = max(min(self._master_numel(bucket), tile) for bucket in buckets)
        num_tiles = sum(-(-self._master_numel(bucket) // tile) for bucket in buckets)
        per_element = 0.0
        if any(bucket.places.optimizer.is_on_disk for bucket in buckets):
            per_element += (
                policy.optimizer.dtype.itemsize + policy.gradients.dtype.itemsize + max(settings.state_nbytes)
            )
        if any(not b.places.is_alias and (b.places.params.is_on_disk or not settings.placing.is_host) for b in buckets):
            per_element += policy.parameters.dtype.itemsize
        buffers = int(per_element * largest)
        ledger.add(STREAMING, buffers, host, min(NUM_SETS, num_tiles))
        if policy.gradients.dtype != policy.optimizer.dtype:
            ledger.add(STREAMING, largest * policy.optimizer.dtype.itemsize, host)
            ledger.drop(STREAMING, largest * policy.optimizer.dtype.itemsize, host)
        ledger.add(STREAMING, buffers, host, -min(NUM_SETS, num_tiles))

    def _release(self, pending: list[int]) -> None:
        for nbytes in pending:
            self.ledger.drop(TEMPORARIES, nbytes)
        pending.clear()

    def _state_nbytes(self, bucket: SizedBucket) -> int:
        """Bytes of optimizer state for a bucket: of the elements, not of their padding."""
        layout, share = bucket.layout, self.settings.policy.optimizer.is_sharded
        runs = (layout if share else BucketLayout(layout.numels, layout.groups, 1)).runs(0)
        per_group = self.settings.state_nbytes
        return int(sum((run.stop - run.start) * per_group[run.group] for run in runs))
