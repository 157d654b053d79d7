"""Unshard parameters before their use, reshard them after, in step with every other rank.

Owned by the engine at ZeRO stage 3; driven by the module hooks (`zero.hooks`). Module calls say what they need
(`request`) and when they are done (`release`); this file decides what goes on the wire, and when.

Note [Ranks stay in step]
    An all-gather needs every rank, but ranks may run their modules in different orders (mixture of experts, layer
    drop, data-dependent branches). A *phase* is one outermost forward, or one backward. In it a rank either

    - follows the *plan*, the sequence of gathers that all ranks were seen to need last time: each rank launches
      exactly the plan, ahead of use (prefetch), and what a deviating rank passes over it keeps until it is used; or
    - has no plan (first runs, or ranks differed): every gather is agreed on first. Ranks tell each other which bucket
      they want, and all of them gather all of the wanted ones.

    A rank whose need is not in the rest of the plan launches that rest, to let the others finish, and goes on by
    agreement. At the end of a phase each rank launches the rest of the plan and then answers wishes until all ranks
    are at their ends. So any order on any rank is served; a known order costs one small all-reduce per phase, in as
    many messages as the number of ranks has binary digits (`Mesh.agree`). The sequence of gathers that was needed
    becomes the plan if all ranks needed the same, twice.

A bucket is resharded when another one is requested and nothing holds it, unless it is used again within
`max_reuse_distance` elements and no more than `max_live` elements are unsharded. The next use is read from the
recorded order of the phase, and for a forward, of the backward that follows.

Invariant: everything collective in here is launched from `_launch` and `_answer`, whose order is the same on all ranks.

After ZeRO-3 / ZeRO-Infinity (arXiv:2104.07857), section 5.1.3 and 6.2. Different: no trace to invalidate.
"""

from __future__ import annotations

import enum
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from deepspeed.utils.errors import RankMismatchError, TierError
from deepspeed.zero.bucket import BucketState
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.loads import KeptMemory, LoadQueue

Agree = Callable[[int, int], Callable[[], Sequence[tuple[int, ...]]]]
"""Begin to exchange a pair of integers with every rank of the shard dim; what is returned waits, and gives the pairs in rank order.
Collective."""

END = -1
"""The wish of a rank that has finished its phase."""

FAILED = -1
"""The digest of a rank that could not load a bucket in its phase."""

LEFT = -2
"""The digest of a rank that was in the phase for the others alone."""


class RankLeftError(RankMismatchError):
    """A rank has failed, and went on with the others only to tell them."""


class PhaseKind(enum.Enum):
    """What runs; decides what is kept unsharded."""

    FORWARD = "forward"
    """A forward that records a graph: a backward follows, which uses the same parameters."""
    INFERENCE = "inference"
    """A forward without a graph."""
    BACKWARD = "backward"
    """After it nothing is kept: the optimizer changes the shards."""


class PhaseKey(NamedTuple):
    """Phases with equal keys are expected to need the same gathers."""

    kind: PhaseKind
    name: str
    num_in_a_row: int


@dataclass
class Record:
    """What is known about phases of one kind (say, the training forward of one model)."""

    plan: list[int] | None = None
    """Gathers that every rank launches, as bucket indices; None while ranks have to agree on each."""
    last_needed: list[int] | None = None
    uses: list[int] = field(default_factory=list)
    """Buckets in the order they were requested last time, repetitions dropped."""


@dataclass
class Phase:
    """One running forward or backward."""

    record: Record
    cursor: int = 0
    is_lost: bool = False
    """Whether this rank left the plan for good."""
    needed: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    def advance(self, plan: Sequence[int]) -> int:
        """The next gather of the plan, which is to be launched now."""
        self.cursor += 1
        return plan[self.cursor - 1]


class Ranks(Protocol):
    """The ranks that share a bucket."""

    @property
    def world_size(self) -> int:
        """How many they are."""
        ...


class Gatherable(Protocol):
    """What the gatherer moves: a bucket, or its sizes alone (`memory.sizes`). The verbs are `Bucket`'s."""

    index: int
    state: BucketState
    holders: int
    loads: LoadQueue

    @property
    def is_sharded(self) -> bool:
        """Whether it can be sharded at all."""
        ...

    @property
    def layout(self) -> BucketLayout:
        """Its sizes."""
        ...

    @property
    def exchange(self) -> Ranks:
        """Whom it is gathered from."""
        ...

    def hold(self, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """Keep it unsharded."""

    def unhold(self, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """One holder less."""

    def regather(self) -> None:
        """Start to gather it."""

    def finish_unshard(self) -> None:
        """Wait for the gather."""

    def reshard(self, *, keeps_written: bool = False) -> None:
        """Drop all but the own slice, which is as it was, or as modules wrote it."""


B = TypeVar("B", bound=Gatherable)


class Gatherer(Generic[B]):
    """Unshards and reshards the sharded buckets of one model; see Note [Ranks stay in step].

    `buckets[i].index` must be i. `prefetch_numel`, `max_live_numel` and `max_reuse_distance` are in elements.
    """

    def __init__(
        self,
        buckets: Sequence[B],
        agree: Agree,
        *,
        prefetch_numel: int,
        max_live_numel: int,
        max_reuse_distance: int,
    ) -> None:
        self.buckets = list(buckets)
        self.num_deviations = 0
        """How often a request was not what the plan expected, for the step summary."""
        self.num_agreements = 0
        self.num_phases = 0
        """Begun so far."""
        self._agree = agree
        self._loads = buckets[0].loads if buckets else LoadQueue()
        self._is_alone = not buckets or buckets[0].exchange.world_size == 1
        self._prefetch_numel = prefetch_numel
        self._max_live_numel = max_live_numel
        self._max_reuse_distance = max_reuse_distance
        self._records: dict[PhaseKey, Record] = {}
        self._phase: Phase | None = None
        self._key: PhaseKey | None = None
        self._fresh: set[int] = set()
        """Buckets that were gathered and not requested since."""
        self._live_numel = 0
        self._stale: dict[int, B] = {}
        """Released since the last request, and to be resharded or kept by the next one."""
        self._follower: dict[PhaseKey, PhaseKey] = {}
        """Which kind of phase came after a kind: a training forward is followed by the backward."""
        self._num_in_a_row = 0

    def add(self, bucket: B) -> None:
        """Gather this bucket too, whose parameters were in others. Plans are made anew. Between phases, on every rank."""
        assert bucket.index == len(self.buckets), "a bucket's index is its position here"
        self.buckets.append(bucket)
        self._records.clear()
        self._follower.clear()
        self._key = None

    @property
    def in_phase(self) -> bool:
        """Whether a forward or backward is running."""
        return self._phase is not None

    @property
    def phase_name(self) -> str:
        """Of the last phase."""
        return self._key.name if self._key is not None else ""

    def begin(self, kind: PhaseKind, name: str = "") -> None:
        """Start a phase; `name` tells apart models or modules that are run on their own. Ends one that is open.

        Phases of one kind in a row (two forwards, then two backwards) are told apart by their number, because the
        first leaves parameters unsharded that the second finds.
        """
        if self._phase is not None:
            self.end()
        before = self._key
        is_again = before is not None and before.kind is kind
        self._num_in_a_row = self._num_in_a_row + 1 if is_again and kind is not PhaseKind.INFERENCE else 0
        key = self._key = PhaseKey(kind, name, self._num_in_a_row)
        if before is not None:
            self._follower[before] = key
        self._phase = Phase(self._records.setdefault(key, Record()))
        self.num_phases += 1
        if kind is not PhaseKind.INFERENCE:
            self._loads.memory = None
        elif self._loads.memory is None:
            self._loads.memory = KeptMemory(self._max_live_numel)
        # Counted anew: between phases, gather contexts unshard and reshard past this object.
        self._live_numel = sum(
            bucket.layout.numel for bucket in self.buckets if bucket.state is not BucketState.SHARDED
        )
        self._prefetch()

    def request(self, bucket: B, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """Make a bucket usable now and hold it, or only `params` of it, until `release` of the same."""
        bucket.hold(params)
        phase = self._phase
        if phase is not None:
            if not phase.uses or phase.uses[-1] != bucket.index:
                phase.uses.append(bucket.index)
                self._drop_stale(phase, bucket)
            if bucket.state is BucketState.SHARDED:
                self._obtain(phase, bucket)
            if bucket.index in self._fresh:  # a gather that nobody asked for is not part of the next plan
                self._fresh.discard(bucket.index)
                phase.needed.append(bucket.index)
        elif bucket.state is BucketState.SHARDED:
            self._launch(bucket)
        bucket.finish_unshard()
        if self._is_alone or phase is None:
            self._loads.raise_failure()
        if phase is not None:
            self._prefetch()

    def release(self, bucket: B, params: Sequence[torch.nn.Parameter] | None = None) -> None:
        """Let go of a bucket; it is resharded when another one is requested."""
        bucket.unhold(params)
        if bucket.holders == 0 and bucket.is_sharded:
            self._stale[bucket.index] = bucket

    def drop(self, bucket: B) -> None:
        """Reshard a bucket that is known not to be used again in this phase."""
        if bucket.holders == 0:
            self._reshard(bucket)

    def end(self, *, has_left: bool = False) -> None:
        """End the phase: keep step with the other ranks until all have ended theirs. Collective.

        Raises TierError on every rank if one of them could not load parameters in this phase, RankLeftError if one `has_left`.
        """
        phase = self._phase
        if phase is None:
            return
        self._finish_plan(phase)
        if self._is_alone:
            phase.record.plan = phase.needed
        else:
            if self._loads.fillings:
                self._loads.start_until()
            digest = FAILED if self._loads.failure else zlib.crc32(repr(phase.needed).encode())
            digests = [theirs for _, theirs in self._answer(END, LEFT if has_left else digest)]
            if FAILED in digests:
                self._phase = None
                self._loads.raise_failure()
                raise TierError(
                    f"rank {digests.index(FAILED)} of the shard group could not load parameters; see its error."
                )
            if LEFT in digests:
                self._phase = None
                self._fresh.clear()
                self._stale.clear()
                self.reshard_all()
                raise RankLeftError(f"rank {digests.index(LEFT)} of the shard group has left; see its error.")
            self._learn(phase, len(set(digests)) == 1)
        phase.record.uses = phase.uses
        self._phase = None
        for bucket in self.buckets:
            is_unused = bucket.index in self._fresh
            if bucket.holders == 0 and (is_unused or not self._is_kept(bucket, phase, len(phase.uses))):
                self._reshard(bucket)
        self._fresh.clear()
        self._stale.clear()

    def reshard_all(self) -> None:
        """Reshard everything that nothing holds; between phases."""
        for bucket in self.buckets:
            if bucket.holders == 0:
                self._reshard(bucket)

    def _learn(self, phase: Phase, all_agree: bool) -> None:
        record = phase.record
        if record.plan is not None and phase.needed != record.plan:
            self.num_deviations += 1
        if not all_agree:
            record.plan, record.last_needed = None, None
        elif phase.needed == record.last_needed:
            record.plan = phase.needed
        else:
            record.plan, record.last_needed = None, phase.needed

    def _obtain(self, phase: Phase, bucket: B) -> None:
        plan = phase.record.plan
        if self._is_alone:
            # Nobody waits for what this rank passes over, so the plan is only a forecast of what to load ahead.
            if plan is not None and bucket.index in itertools.islice(plan, phase.cursor, None):
                phase.cursor = plan.index(bucket.index, phase.cursor) + 1
            self._launch(bucket)
            return
        if plan is not None and not phase.is_lost:
            if bucket.index in itertools.islice(plan, phase.cursor, None):
                while bucket.state is BucketState.SHARDED:
                    self._launch(self.buckets[phase.advance(plan)])
                return
            phase.is_lost = True
            self._finish_plan(phase)
        self._answer(bucket.index)

    def _finish_plan(self, phase: Phase) -> None:
        plan = phase.record.plan or []
        while not self._is_alone and phase.cursor < len(plan):
            bucket = self.buckets[phase.advance(plan)]
            self._launch(bucket)
            if bucket.holders == 0 and bucket.state is BucketState.GATHERING:
                self._reshard(bucket)

    def _launch(self, bucket: B) -> None:
        if bucket.state is BucketState.SHARDED:
            self._live_numel += bucket.layout.numel
            self._fresh.add(bucket.index)
        with torch.profiler.record_function("zero.unshard"):
            bucket.regather()

    def _reshard(self, bucket: B) -> None:
        if bucket.state is not BucketState.SHARDED:
            self._live_numel -= bucket.layout.numel
            self._fresh.discard(bucket.index)
            bucket.reshard(keeps_written=True)

    def _answer(self, wish: int, digest: int = 0) -> Sequence[tuple[int, ...]]:
        """Tell the others a wish and gather what any rank wants, once; a rank at its END does so until all are at theirs. A bucket
        that was gathered for another rank is dropped when it is stale. The last answers."""
        while True:
            self.num_agreements += 1
            if self._loads.fillings:  # a rank that waits for a gather which is queued here cannot answer
                self._loads.start_until()
            answers = self._agree(wish, digest)()
            wanted = sorted({theirs for theirs, _ in answers} - {END})
            for index in wanted:
                self._launch(self.buckets[index])
            if wish != END or not wanted:
                return answers

    def _prefetch(self) -> None:
        phase = self._phase
        if phase is None or phase.is_lost or phase.record.plan is None:
            return
        plan = phase.record.plan
        ahead = sum(self.buckets[i].layout.numel for i in self._fresh)
        while phase.cursor < len(plan):
            ahead += self.buckets[plan[phase.cursor]].layout.numel
            if ahead > self._prefetch_numel:
                break
            self._launch(self.buckets[phase.advance(plan)])

    def _drop_stale(self, phase: Phase, wanted: B) -> None:
        """Reshard what was released before `wanted` was asked for, but for what is needed again soon."""
        self._stale.pop(wanted.index, None)
        for bucket in self._stale.values():
            if bucket.holders == 0 and not self._is_kept(bucket, phase, len(phase.uses) - 1):
                self._reshard(bucket)
        self._stale.clear()

    def _is_kept(self, bucket: B, phase: Phase, position: int) -> bool:
        """Whether a bucket stays unsharded after use number `position` of a forward, for its next use."""
        assert self._key is not None
        if self._key.kind is PhaseKind.BACKWARD or self._live_numel > self._max_live_numel:
            return False
        next_key = self._follower.get(self._key)
        follower = self._records.get(next_key) if next_key else None
        distance = 0
        for index in itertools.chain(phase.record.uses[position:], follower.uses if follower else ()):
            if index == bucket.index:
                return True
            distance += self.buckets[index].layout.numel
            if distance > self._max_reuse_distance:
                return False
        return False
