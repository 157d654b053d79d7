"""When gradients leave the rank: takes them over from autograd, and launches the buckets' reductions in one order.

Made by the engine; fed by one post-accumulate hook per parameter (`LastHook`); read by the optimizer. A hook only takes the
gradient over and counts. When a bucket has all of its gradients they are laid into its flat buffer by one fused call, and
the bucket is reduced on the wire while backward goes on. How, and where the result goes, is the bucket's own
(`zero.gradients`); this is the order.

A hook takes the gradient away: one that came later would see None where plain PyTorch shows it a gradient, and what it edits
would be lost. So ours runs after the script's own, whenever those were registered. Torch calls hooks in the order of their
dictionary, from a list made before the first of them: a hook that finds others behind it moves itself to the end, and is
*early* this once.

Launch order is the same on every rank, whatever order gradients arrive in: a *round* (`Rounds`) launches every bucket exactly
once, in `order`; one that is full waits until all before it have left:

    order    a b c d        full: b      full: a         full: d     end of the round
    due                     -            a b             -           c d

Then it is on the wire, with those that were started before (`InFlight`). Both are pure: `memory.replay` asks them about sizes.
Parameters without a gradient contribute zeros. A round ends in `flush`, at the end of each backward (at
the next forward or the step for one that the engine did not see): an event that all ranks share, where which buckets filled
is each rank's own. A rank that left its part for later would keep others waiting in their backward, and if its next act is
a collective of the user's, for ever. Within one backward a round also ends when a bucket fills a second time.

A backward may be held open (`hold`): buckets that fill then add up on the rank, and are launched when it is let go. Tiled
computations run a backward per tile inside of one, pipelines one per micro-batch, and both want one reduction.

Invariant: within a round every bucket is due exactly once, in `order`. Every rank starts the same reductions in the same
order, and ends them in that order too.

After ZeRO (arXiv:1910.02054), section 5; the bucketing is that of PyTorch's DistributedDataParallel (arXiv:2006.15704).
"""

from __future__ import annotations

import contextlib
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import TierError, TrainingStateError
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gradients import FlatPool, Gradients
from deepspeed.zero.reduction import When
from deepspeed.zero.shown import Assigned, ShownGradients

T = TypeVar("T")

MAX_IN_FLIGHT = 4
"""Reductions on the wire at once; the next launch waits for the oldest, which bounds the borrowed memory."""

MAX_NBYTES_IN_FLIGHT = 512 << 20
"""Bytes on the wire at once where waiting keeps the stream back and not the host: a large model's buckets are modules, of any size."""


class Reducer:
    """Takes gradients over from autograd and reduces them, bucket by bucket.

    in_flight: how much is on the wire at once; the next launch waits for the oldest. `should_reduce()` says whether
    this backward is the one whose sum leaves the rank, for buckets that are reduced at the boundary. `on_complete(bucket)`
    is called when a bucket's parameters have been used for the last time in this backward.
    """

    def __init__(
        self,
        gradients: Sequence[Gradients],
        pool: FlatPool,
        *,
        in_flight: Limit,
        overlap: bool = True,
        should_reduce: Callable[[], bool] = lambda: True,
        on_complete: Callable[[Bucket], None] | None = None,
    ) -> None:
        self.pool = pool
        self.rounds: Rounds[Gradients] = Rounds()
        """The order in which buckets are launched; to be set the same on every rank."""
        self._hooks: list[LastHook] = []
        self._early: list[tuple[Gradients, int, nn.Parameter]] = []
        """Gradients that hooks of the script were yet to see when ours ran."""
        self.saw_backward = False
        """Whether any gradient arrived since the last step, or had to."""
        self.saw_micro_batch = False
        """The same, since the engine last set it to False: after each micro-batch."""
        self.has_stood_in = False
        """Whether all that this rank has of the step is zeros, in place of a backward that was not seen here."""
        self.is_flushed = True
        """Whether `flush` would find nothing to do; False where that is not known."""
        self._is_owed = False
        """Whether a round has to be launched though nothing arrived; see `expect_round`."""
        self.left_out: list[tuple[int, int]] = []
        """(bucket, parameter) whose gradient the script took away: they are not stepped on this rank."""
        self.shown = ShownGradients()
        self._assigned: list[Assigned] | None = None
        """Of the step that is under way."""
        self._overlap = overlap
        self._should_reduce = should_reduce
        self._on_complete = on_complete
        self._num_holds = 0
        self.is_plain = True
        """Whether nothing but counting is to be done when a gradient arrives: none came early, none are shown, and the backward is
        not held open."""
        self._held: dict[Gradients, None] = {}
        """Buckets that filled while the backward was held open, in that order."""
        self._in_flight: InFlight[Gradients] = InFlight(in_flight, operator.methodcaller("finish_reduce"))
        self.add(gradients)

    def add(self, gradients: Sequence[Gradients]) -> None:
        """Take these too; they are launched after those that are here. The same on every rank."""
        self.rounds.add(gradients)
        self._hooks += [LastHook(self, own, i, param) for own in gradients for i, param in enumerate(own.bucket.params)]

    @property
    def gradients(self) -> list[Gradients]:
        """Of every bucket, in the order of masters."""
        return self.rounds.members

    @property
    def order(self) -> list[Gradients]:
        """The same in the order in which they are launched."""
        return self.rounds.order

    # Gradients arrive. ---------------------------------------------------------------------------------------------

    def take_left(self, first: int) -> None:
        """Take the gradients that autograd left in `param.grad` of the buckets from number `first` on, before these were
        here: as if they arrived now. They are reduced with what is left."""
        for gradients in self.gradients[first:]:
            for i, param in enumerate(gradients.bucket.params):
                gradient, param.grad = param.grad, None
                if gradient is not None:
                    gradients.arrivals.take(i, gradient)
                    self.begin_bucket()

    def take(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """`param`, number `index` of its bucket, has its gradient, and every other hook has seen it: take it over, and count."""
        self._take_those_seen()
        if self.shown.shows_any:
            self._begin_again(gradients, index, param)
        if self._num_holds and gradients.has_local and gradients.arrivals.has(index):
            gradients.lay_down()  # one after the other onto the sum, as autograd adds them up, not two at once
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        if not gradients.arrivals.num_here:
            self.begin_bucket()
        arrivals = gradients.arrivals
        if arrivals.take(index, gradient) and not arrivals.awaits_parts(gradients.bucket.params):
            self.fill(gradients)

    def begin_bucket(self) -> None:
        """The first gradient of a bucket is about to be counted."""
        self.saw_backward = self.saw_micro_batch = True
        self.has_stood_in = self.is_flushed = False

    def take_early(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """The same, but other hooks are yet to run: the gradient stays with the parameter until the next arrives."""
        if self.shown.shows_any:
            self._begin_again(gradients, index, param)
        self._early.append((gradients, index, param))
        self.is_plain = self.is_flushed = False
        self.saw_backward = self.saw_micro_batch = True

    def _take_those_seen(self) -> None:
        early, self._early = self._early, []
        for gradients, index, param in early:
            self.take(gradients, index, param)
        self._look()

    def _look(self) -> None:
        self.is_plain = not (self._early or self.shown.shows_any or self._num_holds)

    def _begin_again(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """A backward that nobody announced (outside of the model's outputs) ran into gradients that are shown. What autograd
        added to the view of this one parameter, the first, stays there: every rank's view is averaged again, which leaves
        the average that it had as it is, and averages what was added."""
        if gradients.reduction.share != 1.0:
            raise TrainingStateError(
                f"{gradients.bucket.names[index]}: a second backward ran into gradients that were already summed over ranks.\n"
                '  Call engine(...) or engine.backward(loss) before it, or use "gradient_allreduce_op": "mean".'
            )
        self.hide()
        gradients.arrivals.used.add(index)
        param.grad = torch.zeros_like(param)

    def fill(self, gradients: Gradients) -> None:
        """A bucket has all of its gradients."""
        if gradients.is_whole and self._in_flight.queue:
            self._in_flight.end(gradients)
        if self._num_holds:
            gradients.lay_down()
            self._held[gradients] = None
            return
        if self._on_complete:
            self._on_complete(gradients.bucket)
        if not self._leaves(gradients):
            gradients.lay_down()
            return
        if self.rounds.had_turn(gradients):
            self.flush()  # it was launched in this round: end that one, and begin the next with what came since
        self.rounds.fill(gradients)
        self.is_flushed = False
        if self._overlap:
            for due in self.rounds.due():
                self._launch(due)

    def _leaves(self, gradients: Gradients) -> bool:
        """Whether a bucket's gradients leave the rank in this backward."""
        when = gradients.reduction.when
        if self._num_holds or when is When.NEVER:
            return False
        return when is When.EACH_BACKWARD or self._should_reduce()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the backward open: gradients add up on the rank; what filled leaves when the last context ends. Inside of a
        backward its end then flushes the rest, as ever; around several ones call `flush` after it, which is collective."""
        self._num_holds += 1
        self.is_flushed = False
        self._look()
        try:
            yield
        finally:
            self._num_holds -= 1
            self._look()
            held = [] if self._num_holds else list(self._held)
            self._held = self._held if self._num_holds else {}
        for gradients in held:
            self.fill(gradients)

    def held_sum(self, param: nn.Parameter) -> Tensor | None:
        """While a backward is held open, after `flush`: the sum of a parameter's gradients so far, in place. None: there is
        none, or the parameter does not train."""
        for gradients in self.gradients:
            for i, own in enumerate(gradients.bucket.params):
                if own is param:
                    if not gradients.has_local:
                        gradients.lay_down()
                    gradients.arrivals.used.add(i)
                    self.saw_backward, self.is_flushed = True, False
                    return gradients.sums()[i]
        return None

    @property
    def is_held(self) -> bool:
        """Whether a backward is held open."""
        return self._num_holds > 0

    # Reductions are launched. --------------------------------------------------------------------------------------

    def expect_round(self, was_seen: bool = True) -> None:
        """A backward that all ranks run reached no parameter here: it sends zeros where theirs wait for its part.

        was_seen: whether it is known that there was one.
        """
        self.has_stood_in = not was_seen and (self.has_stood_in or not self.saw_backward)
        self.saw_backward = self.saw_micro_batch = self._is_owed = True
        self.is_flushed = False

    def _launch(self, gradients: Gradients) -> None:
        if gradients.is_whole and self._in_flight.queue:
            self._in_flight.end(gradients)
        if gradients.arrivals.has_any or not gradients.has_local:
            gradients.lay_down()
        if gradients.reduction.when is When.NEVER:
            return
        nbytes = gradients.bucket.layout.padded_numel * gradients.dtype.itemsize
        if self._in_flight.queue:
            self._in_flight.make_room(nbytes)
        with torch.profiler.record_function("zero.reduce"):
            pending = gradients.start_reduce()
        self._in_flight.add(gradients, pending, nbytes)

    def flush(self) -> None:
        """End the round: launch what is left, in order, where gradients have to leave the rank. Collective; while a backward is
        held open nothing leaves, and what is due stays due."""
        self._take_those_seen()
        if self._num_holds:
            self._keep()
            return
        has_begun = self.rounds.has_begun
        is_owed, self._is_owed = self._is_owed, False
        if has_begun or is_owed or _have_unsent(self.order):
            if has_begun or any(self._leaves(gradients) for gradients in self.order):
                for gradients in self.rounds.rest():
                    self._launch(gradients)
            else:
                self._keep()
        self.rounds.end()
        # A bucket that filled in part after its turn is the next round's.
        self.is_flushed = not _have_unsent(self.order)

    def _keep(self) -> None:
        """Lay down what arrived; it stays on the rank."""
        for gradients in self.order:
            if gradients.arrivals.has_any:
                if gradients.is_whole:
                    self._in_flight.end(gradients)
                gradients.lay_down()

    def finish(self) -> None:
        """Deliver every gradient of this step to the optimizer's placement. Collective; call at the boundary."""
        assert not self._num_holds, "the step is inside of a backward that is held open (Reducer.hold)"
        self.left_out = self.shown.adopt()
        self.flush()
        for gradients in self.order:
            is_owed = gradients.is_whole and (gradients.has_local or not gradients.is_reduced)
            if gradients.reduction.when is When.NEVER and is_owed:
                if not gradients.has_local:
                    gradients.lay_down()
                gradients.keep_local()
            elif is_owed and not self._in_flight.has(gradients):
                self._launch(gradients)
        self._in_flight.end_all()
        for gradients in self.order:
            gradients.complete()
        for assigned in self.assigned():
            assigned.take()

    @property
    def failure(self) -> TierError | None:
        """The first gradient of this step that could not be moved to its tier on this rank."""
        return next((gradients.failure for gradients in self.gradients if gradients.failure), None)

    # Gradients are shown. ------------------------------------------------------------------------------------------

    def expose(self) -> None:
        """Show reduced gradients that are whole on this rank as `param.grad`, until `hide`."""
        self.shown.show(self.gradients)
        self._look()

    def veil(self) -> None:
        """Tell a script that looks at `param.grad` before the step, where ranks have slices."""
        veil = self.shown.veil
        if veil.is_due and self.saw_backward and self._should_reduce():
            veil.lower([gradients.bucket for gradients in self.gradients if not gradients.shown])

    def hide(self) -> None:
        """Take back what is shown, as the script left it, before autograd could add to it."""
        if self.shown.shows_any:
            self.shown.hide()
            self._look()

    def assigned(self) -> list[Assigned]:
        """Gradients that the script put where none are shown."""
        if self._assigned is not None:
            return self._assigned
        self._take_those_seen()
        return self.shown.assigned(self.gradients)

    def look_for_assigned(self) -> list[Assigned]:
        """The same, and until `drop` they are as found now: in a step the script has no turn."""
        self._assigned = None
        self._assigned = self.assigned()
        return self._assigned

    def drop(self) -> None:
        """Forget this step's gradients. Waits for what is on the wire."""
        for assigned in self.assigned():
            assigned.param.grad = None
        self._assigned = None
        self._in_flight.end_all()
        self.shown.close()
        if self.saw_backward:
            self.shown.veil.end_step()
        self._look()
        self.left_out = []
        for gradients in self.gradients:
            gradients.drop()
        self.rounds.end()
        self._held.clear()
        self.saw_backward = self.has_stood_in = False

    def close(self) -> None:
        """Forget gradients, remove the hooks, free the memory that was kept for reuse."""
        self.drop()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.pool.clear()


def _have_unsent(order: Sequence[Gradients]) -> bool:
    return any(g.arrivals.has_any or (g.has_local and not g.is_whole) for g in order)


# When buckets leave the rank, pure. --------------------------------------------------------------------------------


@final
class Rounds(Generic[T]):
    """The rounds of some members, in an order that may be learnt."""

    def __init__(self) -> None:
        self.members: list[T] = []
        """In the order in which they were added."""
        self.order: list[T] = []
        self._position: dict[T, int] = {}
        self._next = 0
        self._full: set[T] = set()
        self._filled: dict[T, None] = {}

    def add(self, members: Sequence[T]) -> None:
        """Have these too, after those that are here."""
        self.members += members
        self._set([*self.order, *members])

    def _set(self, order: list[T]) -> None:
        self.order = order
        self._position = {member: i for i, member in enumerate(order)}

    @property
    def has_begun(self) -> bool:
        """Whether a member is full, or was due, in this round."""
        return self._next > 0 or bool(self._full)

    def had_turn(self, member: T) -> bool:
        """Whether a member was full, or was due, in this round: what comes now belongs to the next."""
        return member in self._full or self._position[member] < self._next

    def fill(self, member: T) -> None:
        """A member is full."""
        self._full.add(member)
        self._filled[member] = None

    def due(self) -> Iterator[T]:
        """The members whose turn it is."""
        while self._next < len(self.order) and self.order[self._next] in self._full:
            yield self._advance()

    def rest(self) -> Iterator[T]:
        """The members whose turn has not come, full or not."""
        while self._next < len(self.order):
            yield self._advance()

    def _advance(self) -> T:
        self._next += 1
        return self.order[self._next - 1]

    def end(self) -> None:
        """Begin a round anew."""
        self._next = 0
        self._full.clear()

    def completion_order(self) -> list[int]:
        """Numbers of the members in the order in which they filled since the last call; those that did not, last."""
        seen = [self.members.index(member) for member in self._filled]
        self._filled.clear()
        return seen + [i for i in range(len(self.members)) if i not in seen]

    def set_order(self, numbers: Sequence[int]) -> None:
        """Have this order from the next round on."""
        assert sorted(numbers) == list(range(len(self.members))), f"not an order of all members: {numbers}"
        self._set([self.members[i] for i in numbers])


class Limit(NamedTuple):
    """How much may be on the wire at once; one reduction always may."""

    reductions: int
    nbytes: int
    """Of their flat buffers."""


UNLIMITED = Limit(2**31, 2**62)


class Started(Protocol):
    """Communication that was started (`comm.exchange.Pending`)."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        ...

    def wait(self) -> None:
        """Finish it."""


class Flight(NamedTuple, Generic[T]):
    """A reduction on the wire; `member` keeps its buffer until `pending` has been waited for."""

    member: T
    pending: Started
    nbytes: int
    """Of the flat buffer."""


@final
class InFlight(Generic[T]):
    """What is on the wire: at most `limit`; the next one waits for the oldest. `ended(member)` is called when one was waited for."""

    def __init__(self, limit: Limit, ended: Callable[[T], object]) -> None:
        self.limit = limit
        self._ended = ended
        self.queue: deque[Flight[T]] = deque()
        """In the order in which they were started."""

    def has(self, member: T) -> bool:
        """Whether a reduction of this member is on the wire."""
        return any(other.member is member for other in self.queue)

    def make_room(self, nbytes: int) -> None:
        """A reduction of `nbytes` is about to start while others are on the wire: end those that are done, and the oldest ones if
        it would not fit."""
        while self.queue and (self.queue[0].pending.is_done or not self._has_room(nbytes)):
            self._end_oldest()

    def add(self, member: T, pending: Started, nbytes: int) -> None:
        """It has started."""
        self.queue.append(Flight(member, pending, nbytes))

    @property
    def nbytes(self) -> int:
        """Of the flat buffers of what is on the wire."""
        return sum(other.nbytes for other in self.queue)

    def _has_room(self, nbytes: int) -> bool:
        return len(self.queue) < self.limit.reductions and self.nbytes + nbytes <= self.limit.nbytes

    def end(self, member: T) -> None:
        """Have a flat buffer that stays off the wire before it is written again."""
        while self.has(member):
            self._end_oldest()

    def end_all(self) -> None:
        """Have nothing on the wire."""
        while self.queue:
            self._end_oldest()

    def _end_oldest(self) -> None:
        member, pending, _ = self.queue.popleft()
        pending.wait()
        self._ended(member)


# The hook on a parameter. -------------------------------------------------------------------------------------------


@final
class LastHook:
    """Tells `reducer` of parameter number `index` of a bucket, after the other post-accumulate hooks of the parameter."""

    __slots__ = ("_handle",)

    def __init__(self, reducer: Reducer, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        self._handle = param.register_post_accumulate_grad_hook(_nothing)
        hooks: dict[int, Any] = param._post_accumulate_grad_hooks
        hooks[self._handle.id] = _hook(reducer, gradients, index, hooks, self._handle.id)

    def remove(self) -> None:
        """Take it off the parameter."""
        self._handle.remove()


def _nothing(param: Tensor) -> None:
    """Keeps a place among the hooks until its number is known."""


def _hook(
    reducer: Reducer, gradients: Gradients, index: int, hooks: dict[int, Any], number: int
) -> Callable[[nn.Parameter], None]:
    """The hook itself: a plain function with what it needs around it, which takes a fifth less than an object with attributes."""
    arrivals = gradients.arrivals
    waiting, num_params = arrivals.waiting, arrivals.num_params

    def hook(param: nn.Parameter) -> None:
        """Once per parameter, between autograd's nodes: the usual case without another call, which is half of its time."""
        if len(hooks) != 1 and next(reversed(hooks)) != number:
            hooks[number] = hooks.pop(number)
            reducer.take_early(gradients, index, param)
            return
        if not reducer.is_plain or waiting[index] is not None:
            reducer.take(gradients, index, param)
            return
        gradient = param.grad
        if gradient is None:  # autograd calls the hook for a function that gave this parameter nothing, too
            return
        param.grad = None
        waiting[index] = gradient
        num_here = arrivals.num_here = arrivals.num_here + 1
        if num_here == 1:
            reducer.begin_bucket()
        if num_here == num_params and not arrivals.awaits_parts(gradients.bucket.params):
            reducer.fill(gradients)

    return hook
