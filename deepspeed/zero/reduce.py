"""When gradients leave the rank: takes them over from autograd, and launches the buckets' reductions in one order.

Made by the engine; fed by one post-accumulate hook per parameter, the last of that parameter's; read by the optimizer. A
hook only takes the gradient over and counts. When a bucket has all of its gradients they are laid into its flat buffer by
one fused call, and the bucket is reduced on the wire while backward goes on. How, and where the result goes, is the
bucket's own (`zero.gradients`); this is the order.

Launch order is the same on every rank, whatever order gradients arrive in: a *round* launches every bucket exactly
once, in `order`. Parameters without a gradient contribute zeros. A round ends in `flush`, at the end of each backward (at
the next forward or the step for one that the engine did not see): an event that all ranks share, where which buckets filled
is each rank's own. A rank that left its part for later would keep others waiting in their backward, and if its next act is
a collective of the user's, for ever. Within one backward a round also ends when a bucket fills a second time.

A backward may be held open (`hold`): buckets that fill then add up on the rank, and are launched when it is let go. Tiled
computations run a backward per tile inside of one, pipelines one per micro-batch, and both want one reduction.

After ZeRO (arXiv:1910.02054), section 5; the bucketing is that of PyTorch's DistributedDataParallel (arXiv:2006.15704).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from deepspeed.utils.errors import TierError, TrainingStateError
from deepspeed.zero.arrivals import LastHook
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gradients import Gradients
from deepspeed.zero.pool import FlatPool
from deepspeed.zero.reduction import When
from deepspeed.zero.rounds import InFlight, Limit, Rounds
from deepspeed.zero.shown import Assigned, ShownGradients


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
        """See LastHook: no gradient came early, none are shown, and the backward is not held open."""
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
        """See LastHook: take `param.grad` over, and count."""
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
        """See LastHook."""
        self.saw_backward = self.saw_micro_batch = True
        self.has_stood_in = self.is_flushed = False

    def take_early(self, gradients: Gradients, index: int, param: nn.Parameter) -> None:
        """See LastHook: the gradient stays with the parameter until the next arrives."""
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
        """See LastHook."""
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

    def held_sum(self, param: nn.Parameter) -> torch.Tensor | None:
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
