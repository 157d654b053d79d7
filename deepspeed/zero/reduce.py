"""From autograd's gradients to the gradients' placement: lay down, reduce, deliver.

Owned by the engine; fed by one post-accumulate hook per parameter; read by the optimizer. A hook only takes the
gradient over and counts. When a bucket has all of its gradients they are laid into its flat buffer by one fused call,
and the bucket is reduced on the wire while backward goes on.

    G replicated (stages 0, 1)   flat [W*S] stays; micro-batches add up in it; at the boundary it is reduced into
                                 itself (0) or into this rank's slice of itself (1): delivered to O's placement
    G sharded (stages 2, 3)      flat [W*S] is borrowed for one reduction; the result [S] stays and adds up
    G on a tier                  the result moves to its rest as it arrives, while backward goes on: out of the
                                 borrowed buffer where G is sharded, at the boundary where it is not

Launch order is the same on every rank, whatever order gradients arrive in: a *round* launches every bucket exactly
once, in `order`. Parameters without a gradient contribute zeros. A round ends in `flush`, at the end of each backward (at
the next forward or the step for one that the engine did not see): an event that all ranks share, where which buckets filled
is each rank's own. A rank that left its part for later would keep others waiting in their backward, and if its next act is
a collective of the user's, for ever. Within one backward a round also ends when a bucket fills a second time. Reductions add up in their destination, so several backward passes in
one step are the normal case.

After ZeRO (arXiv:1910.02054), section 5; the bucketing is that of PyTorch's DistributedDataParallel (arXiv:2006.15704).
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.tiers import InMemory, Rest, Transfer
from deepspeed.utils.errors import TierError, TrainingStateError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.policy import ZeroPolicy

MAX_IN_FLIGHT = 4
"""Reductions on the wire at once; the next launch waits for the oldest, which bounds the borrowed memory.

Not where parameters are sharded: there another rank may need a gather from us before it comes to launch its side of
the reduction, and waiting for it would be waiting for each other. Those that are done are taken in all the same.
"""


MAX_STORING = 2
"""Borrowed buffers that may wait for their gradients to reach a tier; the next one waits for the oldest."""


class FlatBuffer:
    """A flat buffer and the views that buckets of its size have of it, made once each."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self._views: dict[int, list[Tensor]] = {}

    def views_of(self, bucket: Bucket) -> list[Tensor]:
        """The parameters' views, in their shapes."""
        if id(bucket) not in self._views:
            self._views[id(bucket)] = bucket.split(self.flat)
        return self._views[id(bucket)]


class FlatPool:
    """Flat buffers lent to reductions and taken back: a few of each size, reused, so that memory is not mapped anew."""

    def __init__(self, max_kept: int = MAX_IN_FLIGHT) -> None:
        self._free: dict[tuple[int, torch.dtype], list[FlatBuffer]] = {}
        self._max_kept = max_kept
        self._storing: deque[BucketGradients] = deque()

    def note_storing(self, gradients: BucketGradients) -> None:
        """A buffer's bytes are on their way to a tier: at most MAX_STORING may be, or backward outruns the disk."""
        self._storing.append(gradients)
        while len(self._storing) > MAX_STORING:
            oldest = self._storing.popleft()
            if oldest.is_storing:
                oldest.finish_oldest_store()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatBuffer:
        """A 1-D buffer, uninitialised."""
        free = self._free.get((numel, dtype))
        return free.pop() if free else FlatBuffer(torch.empty(numel, dtype=dtype, device=device))

    def give_back(self, buffer: FlatBuffer) -> None:
        """Return a buffer that nothing reads any more; it is freed if as many wait as are normally on the wire."""
        free = self._free.setdefault((buffer.flat.numel(), buffer.flat.dtype), [])
        if len(free) < self._max_kept:
            free.append(buffer)

    def clear(self) -> None:
        """Free what is not lent."""
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return sum(buffer.flat.nbytes for buffers in self._free.values() for buffer in buffers)


class BucketGradients:
    """The gradients of one bucket: those that arrived, the flat buffer they are laid in, the reduced result."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        is_sharded: bool,
        delivers_shard: bool,
        dtype: torch.dtype,
        pool: FlatPool,
        rest: Rest | None = None,
    ):
        layout, device = bucket.layout, bucket.full.device
        self.bucket = bucket
        self.dtype = dtype
        self.pool = pool
        self.on_tier = rest
        """Where reduced gradients rest, if that is not the device's memory."""
        self.failure: TierError | None = None
        """A gradient that could not be moved to its rest; told at the step, on every rank."""
        self._norm: Tensor | None = None
        self._storing: deque[tuple[FlatBuffer | None, Tensor, Transfer]] = deque()
        # One rank's shard is the whole: nothing to scatter, so the flat buffer is the result.
        self.is_sharded = is_sharded and (bucket.exchange.world_size > 1 or rest is not None)
        self.delivers_shard = delivers_shard
        self.arrived: list[Tensor | None] = [None] * len(bucket.params)
        self.num_missing = len(bucket.params)
        self.is_reduced = False
        """Whether `result` holds reduced gradients of this step."""
        self.has_local = False
        """Whether `flat` holds gradients of this rank alone."""
        self.flat: Tensor | None = None
        self.result: Tensor
        """[S], or [W*S] where O is replicated; without elements where gradients rest on a tier."""
        if self.is_sharded:
            self.result = torch.zeros(layout.shard_numel if rest is None else 0, dtype=dtype, device=device)
        else:
            self.flat = torch.zeros(layout.padded_numel, dtype=dtype, device=device)
            self.views = bucket.split(self.flat)
            self.result = bucket.own_slice(self.flat) if delivers_shard else self.flat
        self.used: set[int] = set()
        """Parameters that had a gradient in this step, unless `all_used`."""
        self.all_used = False
        self._carry: Tensor | None = None
        self._borrowed: FlatBuffer | None = None
        self._on_wire: deque[tuple[FlatBuffer, Tensor]] = deque()

    @property
    def has_arrivals(self) -> bool:
        """Whether gradients wait to be laid down."""
        return self.num_missing < len(self.arrived)

    def lay_down(self) -> None:
        """Move what arrived into the flat buffer; missing gradients are zeros."""
        if self.flat is None:
            self._borrowed = self.pool.take(self.bucket.layout.padded_numel, self.dtype, self.bucket.full.device)
            self.flat, self.views = self._borrowed.flat, self._borrowed.views_of(self.bucket)
            self.flat[self.bucket.layout.numel :].zero_()
        elif self.is_reduced and not self.is_sharded:
            # A backward after the reduction: put the result aside, it is added back when this one is reduced.
            self._carry = self.result.clone()
            self.is_reduced = False
            self.has_local = False
        here = [
            (view, gradient) for view, gradient in zip(self.views, self.arrived, strict=True) if gradient is not None
        ]
        views, gradients = [view for view, _ in here], [gradient for _, gradient in here]
        if gradients and self.has_local:
            torch._foreach_add_(views, gradients)
        elif gradients:
            torch._foreach_copy_(views, gradients)
        if len(here) == len(self.arrived):
            self.all_used = True
        else:
            self.used.update(i for i, gradient in enumerate(self.arrived) if gradient is not None)
        if not self.has_local and len(here) < len(self.arrived):
            torch._foreach_zero_([view for i, view in enumerate(self.views) if self.arrived[i] is None])
        self.has_local = True
        self.arrived = [None] * len(self.arrived)
        self.num_missing = len(self.arrived)

    @property
    def misses_any(self) -> bool:
        """Whether a parameter had no gradient on this rank in this step."""
        return not self.all_used and len(self.used) < len(self.bucket.params)

    def take_missed_flag(self) -> Tensor:
        """[1], above 0 if any rank missed a gradient: travels in the padding's last element where every rank gets the
        whole sum (O replicated). Call once after the reduction; the element is zero again after it."""
        assert self.flat is not None
        flag = self.flat[-1:].clone()
        self.flat[-1:].zero_()
        return flag

    def start_reduce(self, exchange: Exchange, predivide: float, divide_by: float, dtype: torch.dtype) -> Pending:
        """Start averaging the flat buffer over the ranks, into `result`; on the wire in `dtype`."""
        assert self.flat is not None, "nothing was laid down"
        if predivide != 1.0:
            self.flat.div_(predivide)
        wire = self.flat if dtype == self.flat.dtype else self.flat.to(dtype)
        if self.is_sharded:
            into, loaded = self._landing()
            pending = exchange.start_reduce_scatter(wire, into, divide_by=divide_by, accumulate=self.is_reduced)
            if self.on_tier is not None and self.is_reduced:
                pending = pending.after(functools.partial(self._finish_load, loaded, into))
            # The flat buffer belongs to the reduction now; the next backward takes another.
            assert self._borrowed is not None
            self._on_wire.append((self._borrowed, into))
            self._let_go()
            self.has_local, self.is_reduced = False, True
            return pending
        if self.delivers_shard:
            return exchange.start_reduce_scatter(wire, self.result, divide_by=divide_by, accumulate=False)
        if exchange.world_size > 1:  # one rank knows by itself, and nobody would take the flag out of the norm
            wire[-1:].fill_(float(self.misses_any))
        pending = exchange.start_all_reduce(wire, divide_by=divide_by)
        if wire is not self.flat:
            pending.wait()
            self.flat.copy_(wire)
        return pending

    def finish_reduce(self) -> None:
        """Settle after the reduction ended: give back what was borrowed, add what was put aside."""
        if self.is_sharded:
            self._deliver(*self._on_wire.popleft())
            return
        if self._carry is not None:
            self.result.add_(self._carry)
            self._carry = None
        self.is_reduced, self.has_local = True, False

    def _landing(self) -> tuple[Tensor, Transfer | None]:
        """Where the reduction's result goes, and the load of what it is added to there, if that can start already.

        An earlier micro-batch's reduction of this bucket may still be on the wire, since launches do not wait. What it
        brings is then neither on the tier nor on its way there, and the load has to wait until it was taken in.
        """
        assert self.flat is not None, "nothing was laid down"
        if self.on_tier is None:
            return self.result, None
        if not self.is_reduced:
            return self.bucket.own_slice(self.flat), None
        into = torch.empty(self.on_tier.numel, dtype=self.dtype, device=self.bucket.full.device)
        return into, None if self._on_wire else self._start_load(into)

    def _start_load(self, into: Tensor) -> Transfer:
        assert self.on_tier is not None, "only gradients on a tier are loaded"
        while self._storing:
            self.finish_oldest_store()
        return self.on_tier.start_load(0, into)

    def _finish_load(self, loaded: Transfer | None, into: Tensor) -> None:
        """Have in `into` what the reduction adds to. Reductions end in launch order: the earlier ones were taken in."""
        try:
            (loaded or self._start_load(into)).wait()
        except TierError as error:
            self.failure = self.failure or error
            into.zero_()

    def _deliver(self, buffer: FlatBuffer, values: Tensor) -> None:
        """Give a borrowed buffer back; where gradients rest on a tier, once they have arrived there."""
        if self.on_tier is None:
            self.pool.give_back(buffer)
        else:
            self._store(values, buffer)

    def _store(self, values: Tensor, buffer: FlatBuffer | None) -> None:
        assert self.on_tier is not None, "only gradients on a tier are stored"
        self._norm = torch.linalg.vector_norm(values, 2, dtype=torch.float32)
        self._storing.append((buffer, values, self.on_tier.start_store(0, values)))
        self.pool.note_storing(self)

    @property
    def is_storing(self) -> bool:
        """Whether gradients are on their way to their rest."""
        return bool(self._storing)

    def finish_oldest_store(self) -> None:
        """Wait until the oldest buffer's gradients have arrived at their rest, and give it back."""
        buffer, _, transfer = self._storing.popleft()
        try:
            transfer.wait()
        except TierError as error:
            self.failure = self.failure or error
        if buffer is not None:
            self.pool.give_back(buffer)

    def rest(self) -> Rest:
        """Where this step's reduced gradients are; after `Reducer.finish`."""
        return self.on_tier or InMemory(self.result)

    def norm(self) -> Tensor:
        """Their 2-norm, fp32."""
        return torch.linalg.vector_norm(self.result, 2, dtype=torch.float32) if self._norm is None else self._norm

    def values(self) -> Tensor:
        """This step's reduced gradients: the bytes themselves, or a copy on the device where they rest on a tier."""
        if self.on_tier is None:
            return self.result
        while self._storing:
            self.finish_oldest_store()
        copy = torch.empty(self.on_tier.numel, dtype=self.dtype, device=self.bucket.full.device)
        self.on_tier.start_load(0, copy).wait()
        return copy

    def replace(self, values: Tensor) -> None:
        """Put back what `values` gave, changed."""
        if self.on_tier is not None:
            if not self.is_sharded and values is not self.result:
                self.result.copy_(values)
            self._store(values, None)
            while self._storing:  # empty already where this very store was the oldest of too many
                self.finish_oldest_store()

    def settle_at_boundary(self) -> None:
        """Have the gradients complete and at their rest."""
        if not self.is_reduced:
            self.result.zero_()
            self.is_reduced = True
            if self.on_tier is not None and self.is_sharded:
                self.replace(torch.zeros(self.on_tier.numel, dtype=self.dtype, device=self.bucket.full.device))
        if self.on_tier is not None and not self.is_sharded:
            self.replace(self.result)
        while self._storing:
            self.finish_oldest_store()

    def drop(self) -> None:
        """Forget this step's gradients, keeping the memory."""
        while self._storing:
            self.finish_oldest_store()
        self._norm = self.failure = None
        self.arrived = [None] * len(self.arrived)
        self.num_missing = len(self.arrived)
        self.is_reduced = self.has_local = self.all_used = False
        self.used.clear()
        self._carry = None
        if self._borrowed is not None:
            self.pool.give_back(self._borrowed)
            self._let_go()

    def _let_go(self) -> None:
        self._borrowed, self.flat, self.views = None, None, []

    @property
    def nbytes(self) -> int:
        """Bytes of gradients at rest between micro-batches, on whatever tier."""
        on_tier = self.on_tier.numel * self.on_tier.dtype.itemsize if self.on_tier is not None else 0
        here = self.result.nbytes if self.is_sharded else (self.flat.nbytes if self.flat is not None else 0)
        return here + on_tier


class Reducer:
    """Takes gradients over from autograd and reduces them, bucket by bucket.

    `rests[i]` is where the gradients of bucket i rest, None for the device's memory. `should_reduce()` says whether this backward is the one whose sum leaves the rank (the boundary) where gradients
    rest replicated; sharded gradients are reduced by every backward. `on_complete(bucket)` is called when a bucket's
    parameters have been used for the last time in this backward.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        policy: ZeroPolicy,
        *,
        replicas: Exchange | None = None,
        overlap: bool = True,
        predivide: float = 1.0,
        divide_by: float = 1.0,
        wire_dtype: torch.dtype | None = None,
        should_reduce: Callable[[], bool] = lambda: True,
        on_complete: Callable[[Bucket], None] | None = None,
        rests: Sequence[Rest | None] = (),
    ) -> None:
        self.pool = FlatPool(MAX_STORING if any(rests) else MAX_IN_FLIGHT)
        self.gradients = [
            BucketGradients(
                bucket,
                is_sharded=policy.gradients.is_sharded,
                delivers_shard=policy.optimizer.is_sharded,
                dtype=policy.gradients.dtype,
                pool=self.pool,
                rest=rest,
            )
            for bucket, rest in itertools.zip_longest(buckets, rests)
        ]
        self.order = list(self.gradients)
        self.saw_backward = False
        """Whether any gradient arrived since the last step."""
        self.num_exposed = 0
        self._max_in_flight = len(buckets) + 1 if policy.parameters.is_sharded else MAX_IN_FLIGHT
        self._replicas = replicas
        self._overlap = overlap
        self._predivide, self._divide_by = predivide, divide_by
        self._wire_dtype = wire_dtype or policy.gradients.dtype
        self._should_reduce = should_reduce
        self._on_complete = on_complete
        self._next = 0
        self._completion: list[BucketGradients] = []
        self._ready: set[int] = set()
        self._in_flight: deque[tuple[BucketGradients, Pending]] = deque()
        self._handles = [
            param.register_post_accumulate_grad_hook(functools.partial(self._take, gradients, i))
            for gradients in self.gradients
            for i, param in enumerate(gradients.bucket.params)
        ]

    def _take(self, gradients: BucketGradients, index: int, param: nn.Parameter) -> None:
        """The hook: take `param.grad` over, and count."""
        if self.num_exposed:
            raise TrainingStateError(
                f"{gradients.bucket.names[index]}: a second backward ran into gradients that were already averaged.\n"
                "  Call engine(...) or engine.backward(loss) so that the engine sees the new backward begin."
            )
        gradient, param.grad = param.grad, None
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.to_dense()
        self.saw_backward = True
        before = gradients.arrived[index]
        if before is not None:
            assert gradient is not None
            gradients.arrived[index] = before + gradient
            return
        gradients.arrived[index] = gradient
        gradients.num_missing -= 1
        if gradients.num_missing == 0:
            self._complete(gradients)

    def _complete(self, gradients: BucketGradients) -> None:
        if self._on_complete:
            self._on_complete(gradients.bucket)
        self._settle(gradients)
        if not (gradients.is_sharded or self._should_reduce()):
            gradients.lay_down()
            return
        position = self.order.index(gradients) if len(self.order) > 1 else 0
        if position in self._ready or position < self._next:
            arrived, gradients.arrived = gradients.arrived, [None] * len(gradients.arrived)
            gradients.num_missing = len(arrived)
            self.flush()
            gradients.arrived, gradients.num_missing = arrived, 0
        self._completion.append(gradients)
        self._ready.add(position)
        if self._overlap:
            self._launch_ready()

    def _settle(self, gradients: BucketGradients) -> None:
        """Have a replicated flat buffer off the wire before it is written again."""
        while not gradients.is_sharded and any(other is gradients for other, _ in self._in_flight):
            self._wait_oldest()

    def _launch_ready(self) -> None:
        while self._next in self._ready:
            self._launch(self.order[self._next])

    def _launch(self, gradients: BucketGradients) -> None:
        self._next += 1
        self._settle(gradients)
        if gradients.has_arrivals or not gradients.has_local:
            gradients.lay_down()
        while self._in_flight and (self._in_flight[0][1].is_done or len(self._in_flight) >= self._max_in_flight):
            self._wait_oldest()
        with torch.profiler.record_function("zero.reduce"):
            pending = gradients.start_reduce(
                gradients.bucket.exchange, self._predivide, self._divide_by, self._wire_dtype
            )
        self._in_flight.append((gradients, pending))

    def _wait_oldest(self) -> None:
        gradients, pending = self._in_flight.popleft()
        pending.wait()
        gradients.finish_reduce()

    def flush(self) -> None:
        """End the round: launch what is left, in order, where gradients have to leave the rank. Collective."""
        begun = self._next > 0 or bool(self._ready) or any(gradients.has_arrivals for gradients in self.order)
        if not begun:
            return
        if not (self.order[0].is_sharded or self._should_reduce() or self._next > 0 or self._ready):
            for gradients in self.order:
                if gradients.has_arrivals:
                    self._settle(gradients)
                    gradients.lay_down()
            return
        while self._next < len(self.order):
            self._launch(self.order[self._next])
        self._next = 0
        self._ready.clear()

    def finish(self) -> None:
        """Deliver every gradient of this step to the optimizer's placement. Collective; call at the boundary."""
        self.flush()
        local = [g for g in self.order if not g.is_sharded and (g.has_local or not g.is_reduced)]
        in_flight = {id(gradients) for gradients, _ in self._in_flight}
        for gradients in local:
            if id(gradients) not in in_flight:
                self._launch(gradients)
        self._next = 0
        while self._in_flight:
            self._wait_oldest()
        for gradients in self.order:
            if self._replicas is not None and gradients.is_reduced:
                values = gradients.values()
                self._replicas.start_all_reduce(values, divide_by=self._replicas.world_size).wait()
                gradients.replace(values)
            gradients.settle_at_boundary()

    @property
    def failure(self) -> TierError | None:
        """The first gradient of this step that could not be moved to its tier on this rank."""
        return next((gradients.failure for gradients in self.gradients if gradients.failure), None)

    def expose(self) -> None:
        """Show reduced, replicated gradients as `param.grad` (stage 0), as views, until `hide`."""
        for gradients in self.gradients:
            is_whole = gradients.is_reduced and not gradients.is_sharded and not gradients.delivers_shard
            if is_whole and gradients.dtype == gradients.bucket.dtype:
                for param, view in zip(gradients.bucket.params, gradients.views, strict=True):
                    param.grad = view
                self.num_exposed += 1

    def hide(self) -> None:
        """Take the views back, before autograd could add to them."""
        if self.num_exposed:
            for gradients in self.gradients:
                for param in gradients.bucket.params:
                    param.grad = None
            self.num_exposed = 0

    def drop(self) -> None:
        """Forget this step's gradients. Waits for what is on the wire."""
        while self._in_flight:
            self._wait_oldest()
        self.hide()
        for gradients in self.gradients:
            gradients.drop()
        self._next = 0
        self._ready.clear()
        self.saw_backward = False

    def completion_order(self) -> list[int]:
        """Bucket positions in the order in which they filled since the last call; those that did not, last."""
        seen = list(dict.fromkeys(self.gradients.index(gradients) for gradients in self._completion))
        self._completion.clear()
        return seen + [i for i in range(len(self.gradients)) if i not in seen]

    def set_order(self, order: Sequence[int]) -> None:
        """Launch in this order from the next round on; must be the same on every rank."""
        assert sorted(order) == list(range(len(self.gradients))), f"not an order of all buckets: {order}"
        self.order = [self.gradients[i] for i in order]

    def close(self) -> None:
        """Forget gradients, remove the hooks, free the memory that was kept for reuse."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.pool.clear()
