"""The gradients of one bucket, from their arrival to their placement: laid into a flat buffer, reduced, delivered.

Made in `assembly.assemble`, one per trained bucket; driven by `zero.reduce`, which decides when; read by the optimizer. How a
bucket is reduced is a row, `zero.reduction.Reduction`. What autograd gave waits in `Arrivals` until it is laid down. Where
gradients live is one of three classes behind `Gradients`:

    WholeGradients    flat [W*S] stays, micro-batches add up in it; at the boundary it is reduced into itself (O replicated)
                      or into this rank's slice of itself, and brought to rest from there      ZeRO stages 0, 1; one rank
    SlicedGradients   flat [W*S] is borrowed for one reduction; the result [S] stays and adds up            stages 2, 3
    TieredGradients   the same, but the result moves to its rest on a tier and is added to there            stages 2, 3

Memory is taken when it is first asked for, in the first backward: while a model is built, cut and handed over there is none.
Where gradients rest sharded a bucket has a flat buffer only from its last gradient until its reduction ended, lent by a
`FlatPool`, one per reducer. A few are kept, so that memory is not mapped anew, together with the views that buckets have of them.

Invariants. A gradient is owned by exactly one place, autograd's tensor in `Arrivals` or the flat buffer, never by both.
Reductions add up in their destination, so several backward passes in one step are the normal case. Between `start_reduce` and
`finish_reduce` the flat buffer belongs to the wire; finishing is in the order of starting. A lent buffer is given back when
nothing reads it any more, and by whom it was lent to.

After ZeRO (arXiv:1910.02054), section 5.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from operator import attrgetter, contains
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from deepspeed.comm.exchange import Pending, Shelf
from deepspeed.tiers import InMemory, Rest
from deepspeed.utils.errors import TierError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.reduction import Reduction, When

READY = "ds_grad_is_ready"
"""Attribute by which code that runs several backward passes per parameter says which of them is the last."""

MAX_KEPT = 1
"""What is kept of buffers that came back, in buffers of the largest size: malloc recycles the others as well, and not only for
us. With 1, 2 and 4 a step of two ranks takes the same CPU time (GPT of 24M, fp32, stages 1 to 3)."""

MAX_STORING = 2
"""Borrowed buffers that may wait for their gradients to reach a tier; the next one waits for the oldest."""

ROW = 1024
"""Elements whose squares are added up one after the other."""


_is_sparse = attrgetter("is_sparse")


@final
class Arrivals:
    """The gradients of one bucket's parameters since they were last laid down."""

    __slots__ = ("_all", "_attributes", "_params", "_parts", "num_here", "num_params", "rows", "used", "waiting")

    def __init__(self, num_params: int) -> None:
        self.num_params = num_params
        self.waiting: list[Tensor | None] = [None] * num_params
        """By parameter, what waits; the same list for life. The reducer's hook fills it, and counts, where `take` would do no more."""
        self.num_here = 0
        """Of how many parameters a gradient waits to be laid down."""
        self._all = frozenset(range(num_params))
        self._params: Sequence[nn.Parameter] = ()
        self._attributes: list[dict[str, Any]] = []
        """The `__dict__` of each of `_params`, the same object for life: making the list takes seven times as long as reading it."""
        self._parts: set[int] = set()
        """Parameters of whose gradients more is to come; known where all have arrived."""
        self.used: set[int] = set()
        """Parameters that had a gradient in this step."""
        self.rows: dict[int, list[Tensor]] = {}
        """By parameter, the rows that this step's sparse gradients list, for an optimizer that steps no others."""

    @property
    def has_any(self) -> bool:
        """Whether gradients wait to be laid down."""
        return self.num_here > 0

    @property
    def misses_any(self) -> bool:
        """Whether a parameter had no gradient on this rank in this step."""
        return len(self.used) < self.num_params

    def has(self, index: int) -> bool:
        """Whether a parameter's gradient waits to be laid down."""
        return self.waiting[index] is not None

    def take(self, index: int, gradient: Tensor) -> bool:
        """Take a gradient over, or add it to the one that waits; whether that was the last one of the bucket, or may have been
        (`awaits_parts`). Runs once per parameter, between autograd's nodes: it touches as little memory as it can."""
        before = self.waiting[index]
        if before is not None:
            return self._add(index, before, gradient)
        self.waiting[index] = gradient
        self.num_here += 1
        return self.num_here == self.num_params

    def _add(self, index: int, before: Tensor, gradient: Tensor) -> bool:
        if not (before.is_sparse and gradient.is_sparse):
            self._note_rows([(index, before), (index, gradient)])
            before, gradient = _dense(before), _dense(gradient)
        self.waiting[index] = before + gradient
        if index not in self._parts:
            return False
        self._parts.discard(index)
        return not self._parts

    def awaits_parts(self, params: Sequence[nn.Parameter]) -> bool:
        """All have arrived: whether some arrived in part (`ds_grad_is_ready` is False), and are complete with one to come."""
        if params is not self._params:
            self._params, self._attributes = params, list(map(vars, params))
        if any(map(contains, self._attributes, repeat(READY))):  # of many parameters usually none
            self._parts.update(i for i, known in enumerate(self._attributes) if not known.get(READY, True))
        return bool(self._parts)

    def end_step(self) -> None:
        """The next gradients are another step's."""
        self.used.clear()
        self.rows.clear()

    def lay_into(self, views: Sequence[Tensor], adds: bool) -> None:
        """Write what waits into the parameters' views, or add it. Unless it adds, what did not arrive becomes zero."""
        is_complete = self.num_here == self.num_params  # as nearly always
        here = self._all if is_complete else [i for i, t in enumerate(self.waiting) if t is not None]
        gradients = self._dense_ones()
        targets = list(views) if is_complete else [views[i] for i in here]
        if gradients and adds:
            torch._foreach_add_(targets, gradients)
        elif gradients:
            torch._foreach_copy_(targets, gradients)
        if not adds and len(here) < self.num_params:
            torch._foreach_zero_([view for i, view in enumerate(views) if self.waiting[i] is None])
        self.used.update(here)
        self.forget()

    def _dense_ones(self) -> list[Tensor]:
        gradients = [tensor for tensor in self.waiting if tensor is not None]
        if not any(map(_is_sparse, gradients)):
            return gradients
        self._note_rows((i, tensor) for i, tensor in enumerate(self.waiting) if tensor is not None)
        return list(map(_dense, gradients))

    def _note_rows(self, gradients: Iterable[tuple[int, Tensor]]) -> None:
        for index, gradient in gradients:
            if gradient.is_sparse:
                self.rows.setdefault(index, []).append(gradient._indices()[0])

    def forget(self) -> None:
        """Let go of what waits."""
        self.waiting[:] = repeat(None, self.num_params)
        self._parts.clear()
        self.num_here = 0


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


class FlatBuffer:
    """A flat buffer, and the views that buckets have of it, made once each."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = self.flat = whole
        """All of its memory, and as much of it as the bucket needs to which it is lent."""
        self._views: dict[int, list[Tensor]] = {}

    def views_of(self, bucket: Bucket) -> list[Tensor]:
        """The parameters' views, in their shapes."""
        if id(bucket) not in self._views:
            self._views[id(bucket)] = bucket.split(self.flat)
        return self._views[id(bucket)]


class FlatPool:
    """Lends flat buffers; keeps as many bytes as `max_kept` of the largest have."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._shelves: dict[tuple[torch.dtype, torch.device], Shelf[FlatBuffer]] = {}
        self._storing: deque[Callable[[], None]] = deque()

    def note_storing(self, finish: Callable[[], None]) -> None:
        """A buffer's bytes are on their way to a tier, and `finish` waits for them: at most MAX_STORING may be, or backward
        outruns the disk."""
        self._storing.append(finish)
        while len(self._storing) > MAX_STORING:
            self._storing.popleft()()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatBuffer:
        """A 1-D buffer, uninitialised."""
        found = self._shelf(dtype, device).take(numel * dtype.itemsize)
        if found is None:
            return FlatBuffer(torch.empty(numel, dtype=dtype, device=device))
        buffer = found[1]
        buffer.flat = buffer.whole[:numel]
        return buffer

    def give_back(self, buffer: FlatBuffer) -> None:
        """Return a buffer that nothing reads any more; small ones are freed where too much is kept."""
        whole = buffer.whole
        self._shelf(whole.dtype, whole.device).give_back(whole.nbytes, buffer)

    def _shelf(self, dtype: torch.dtype, device: torch.device) -> Shelf[FlatBuffer]:
        kind = (dtype, device)
        if kind not in self._shelves:
            self._shelves[kind] = Shelf(self._max_kept)
        return self._shelves[kind]

    def clear(self) -> None:
        """Free what is not lent."""
        for shelf in self._shelves.values():
            shelf.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept for reuse."""
        return sum(shelf.nbytes for shelf in self._shelves.values())


class Gradients(Protocol):
    """What the reducer drives and the step reads."""

    bucket: Bucket
    reduction: Reduction
    dtype: torch.dtype
    arrivals: Arrivals
    is_reduced: bool
    """Whether there are reduced gradients of this step."""

    @property
    def result(self) -> Tensor:
        """[S], or [W*S] where O is replicated: reduced gradients; without elements where they rest on a tier."""

    @property
    def has_local(self) -> bool:
        """Whether the flat buffer holds gradients of this rank alone."""

    @property
    def is_whole(self) -> bool:
        """Whether the flat buffer is their own and stays: a reduction of it must end before `lay_down` may write."""

    @property
    def shown(self) -> Sequence[Tensor]:
        """The parameters' averaged gradients as views, if they are whole on this rank, in memory."""

    @property
    def local_views(self) -> Sequence[Tensor]:
        """This rank's own sums as views, by parameter, where they are whole and stay on the rank (`When.NEVER`)."""

    def sums(self) -> Sequence[Tensor]:
        """What was laid down on this rank and not reduced, as views by parameter; none where nothing was."""

    @property
    def failure(self) -> TierError | None:
        """Gradients of this step that could not be moved to their rest on this rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of gradients at rest between micro-batches, on whatever tier; in memory from the first backward on."""

    def lay_down(self) -> None:
        """Move what arrived into the flat buffer, adding to what is there; missing gradients are zeros."""

    def start_reduce(self) -> Pending:
        """Start averaging the flat buffer over the ranks. Collective: every rank, same order."""

    def finish_reduce(self) -> None:
        """Settle after the oldest reduction ended: give back what was borrowed, add what was put aside."""

    def keep_local(self) -> None:
        """Take this rank's own sum for the result, unreduced."""

    def complete(self) -> None:
        """At the boundary: average with the replicas, and have the gradients complete and at rest. Collective."""

    def take_missed_flag(self) -> Tensor | None:
        """[1], above 0 if any rank missed a gradient, where the reduction brought that along; None where it did not. Call
        once after the reduction, before the norm."""

    def norm(self) -> Tensor:
        """2-norm of this step's reduced gradients on this rank, fp32."""

    def rest(self) -> Rest:
        """Where this step's reduced gradients are, after `complete`."""

    def values(self) -> Tensor:
        """This step's reduced gradients: the bytes themselves, or a copy on the device where they rest on a tier."""

    def replace(self, values: Tensor) -> None:
        """Put back what `values` gave, changed."""

    def drop(self) -> None:
        """Forget this step's gradients, keeping the memory."""


class Scattered(ABC):
    """What both are: gradients in a flat buffer that the bucket borrows from the pool, from the first of them to their reduction."""

    is_whole = False
    shown: Sequence[Tensor] = ()
    local_views: Sequence[Tensor] = ()

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool) -> None:
        self.bucket, self.reduction, self.dtype = bucket, reduction, dtype
        self.arrivals = Arrivals(len(bucket.params))
        self.is_reduced = False
        self._pool = pool
        self._buffer: FlatBuffer | None = None

    @property
    def has_local(self) -> bool:
        """See Gradients."""
        return self._buffer is not None

    def sums(self) -> Sequence[Tensor]:
        """See Gradients."""
        return self._buffer.views_of(self.bucket) if self._buffer is not None else ()

    def lay_down(self) -> None:
        """See Gradients."""
        buffer, adds = self._buffer, self._buffer is not None
        if buffer is None:
            layout = self.bucket.layout
            buffer = self._buffer = self._pool.take(layout.padded_numel, self.dtype, self.bucket.full.device)
            buffer.flat[layout.numel :].zero_()
        self.arrivals.lay_into(buffer.views_of(self.bucket), adds)

    def _hand_over(self) -> FlatBuffer:
        """The buffer, which belongs to a reduction now; the next backward takes another."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "nothing was laid down"
        return buffer

    def keep_local(self) -> None:
        """See Gradients."""
        raise AssertionError("each backward's are reduced: nothing stays this rank's own")

    def take_missed_flag(self) -> Tensor | None:
        """See Gradients. It travels with the norm."""
        return None

    @abstractmethod
    def start_reduce(self) -> Pending:
        """See Gradients."""

    @abstractmethod
    def finish_reduce(self) -> None:
        """See Gradients."""

    def drop(self) -> None:
        """See Gradients."""
        self.arrivals.forget()
        self.arrivals.end_step()
        if self._buffer is not None:
            self._pool.give_back(self._hand_over())
        self.is_reduced = False


@final
class SlicedGradients(Scattered):
    """Each backward's are scattered into this rank's slice, where they add up."""

    failure: TierError | None = None

    def __init__(self, bucket: Bucket, reduction: Reduction, dtype: torch.dtype, pool: FlatPool) -> None:
        super().__init__(bucket, reduction, dtype, pool)
        self._goes_as_it_is = reduction.predivide == 1.0 and reduction.wire_dtype in (None, dtype)
        self._on_wire: deque[FlatBuffer] = deque()

    @functools.cached_property
    def result(self) -> Tensor:
        """See Gradients. [S], from the first reduction on."""
        return torch.zeros(self.bucket.layout.shard_numel, dtype=self.dtype, device=self.bucket.full.device)

    @functools.cached_property
    def _resident(self) -> Rest:
        return InMemory(self.result)

    @property
    def nbytes(self) -> int:
        """See Gradients."""
        return self.result.nbytes if "result" in vars(self) else 0

    def start_reduce(self) -> Pending:
        """See Gradients."""
        buffer = self._hand_over()
        wire = buffer.flat if self._goes_as_it_is else self.reduction.to_wire(buffer.flat)
        self._on_wire.append(buffer)
        accumulate, self.is_reduced = self.is_reduced, True
        return self.reduction.exchange.start_reduce_scatter(
            wire, self.result, divide_by=self.reduction.divide_by, accumulate=accumulate
        )

    def finish_reduce(self) -> None:
        """See Gradients."""
        self._pool.give_back(self._on_wire.popleft())

    def complete(self) -> None:
        """See Gradients."""
        if not self.is_reduced:
            self.result.zero_()
            self.is_reduced = True
        self.reduction.average_replicas(self.result)

    def norm(self) -> Tensor:
        """See Gradients."""
        return norm_of(self.result)

    def rest(self) -> Rest:
        """See Gradients."""
        return self._resident

    def values(self) -> Tensor:
        """See Gradients."""
        return self.result

    def replace(self, values: Tensor) -> None:
        """See Gradients. They were changed in place."""


def norm_of(values: Tensor) -> Tensor:
    """[] their 2-norm, in fp32 or what is wider.

    On CPUs torch adds squares up one after the other: in fp32, 8M of them are off by 2e-4. By rows it is 4e-8, in the same time.
    Other devices go the same way, so that they clip by the same bits.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    num_rows = values.numel() // ROW
    if num_rows < 2:
        return torch.linalg.vector_norm(values, 2, dtype=dtype)
    flat = values.reshape(-1)
    rows = torch.linalg.vector_norm(flat[: num_rows * ROW].view(num_rows, ROW), 2, dim=1, dtype=dtype)
    if num_rows * ROW == flat.numel():
        return norm_of(rows)
    rest = torch.linalg.vector_norm(flat[num_rows * ROW :], 2, dtype=dtype)
    return torch.hypot(norm_of(rows), rest)


def leave_local(buckets: Sequence[Gradients], is_local: bool) -> None:
    """From the next step on have gradients that are reduced at the boundary stay on their rank instead, or not any more. The
    same on every rank, between steps."""
    before, after = (When.AT_BOUNDARY, When.NEVER) if is_local else (When.NEVER, When.AT_BOUNDARY)
    for gradients in buckets:
        if gradients.reduction.when is before:
            gradients.reduction = replace(gradients.reduction, when=after)
