"""The training step: forward, backward, and what happens when a micro-batch ends, in the order in which it happens.

What scripts call is `TrainingStep`, a part of the engine, which counts steps and knows schedules; `Conductor` has what engines
of pipelines, which step in another manner, do alike.

    forward     end a backward left open; bring states back; unshard, compute, reshard     zero.gather, zero.hooks
    backward    scale; gradients are taken over, reduced on the way                        zero.reduce
    step        at the boundary: norm, skip or clip, update, publish                       zero.optimizer
                then the schedules, the counters, the observers

Invariant: the conductor holds no engine. Whatever is refused is refused before anything changes.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.comm.interrupts import HELD
from deepspeed.engine.accumulation import Accumulation
from deepspeed.engine.build import Parts, Watching, Zero
from deepspeed.engine.facts import Progress, StepFacts
from deepspeed.engine.forward import ForwardCasts
from deepspeed.engine.observer import Observer
from deepspeed.engine.recompute import Recomputation
from deepspeed.engine.schedules import Schedules
from deepspeed.parallel.sequence.loss import SequenceLoss
from deepspeed.utils.errors import TrainingStateError
from deepspeed.zero.gather import Gatherer
from deepspeed.zero.hooks import BackwardWatch
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.takeover import NO_BACKWARD

NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class TrainingStep(nn.Module):
    """The engine's part that a training loop calls, micro-batch by micro-batch."""

    accumulation: Accumulation
    watch: BackwardWatch
    losses: Tensor | None
    """The last micro-batch's, detached."""
    global_steps: int
    global_samples: int
    skipped_steps: int
    _ended: list[bool]
    _zero: Zero
    _reducer: Reducer
    _gatherer: Gatherer | None
    _conductor: Conductor
    _casts: ForwardCasts
    _recomputation: Recomputation
    _sequence_loss: SequenceLoss | None
    _schedules: Schedules
    _observers: Sequence[Observer]
    _micro_batch_size: int
    _was_step_applied: bool

    @property
    @abstractmethod
    def dp_world_size(self) -> int:
        """Ranks with samples of their own."""

    @abstractmethod
    def train_batch_size(self) -> int:
        """Samples per step over all ranks, from the next step on."""

    @abstractmethod
    def _step_facts(self, progress: Progress) -> StepFacts:
        """What the step that just ended gave."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's own output for its own arguments."""
        if self._ended:
            raise TrainingStateError(
                "this engine was destroyed, or its model given to a newer engine.\n"
                "  Use the newer one, or make one with deepspeed.initialize."
            )
        module = self._modules["module"]  # which `self.module` finds after three other places
        assert module is not None, "an engine has one"
        is_graded, reducer, casts = torch.is_grad_enabled(), self._reducer, self._casts
        recomputes = torch._C._current_graph_task_id() != -1  # in a backward, for a checkpoint around this call
        with (
            NOTHING if is_graded or self._gatherer is None else HELD
        ):  # evaluation at stage 3 is collective as a step is
            if not recomputes:
                self.watch.end()  # first, of a backward that failed: what follows may free what it still holds
            self._conductor.reload_states()  # before hide, which may have to copy gradients that are away
            if is_graded and not recomputes:
                if reducer.shown.shows_any:  # stage 0: averaged gradients; autograd has to add to the local ones
                    reducer.hide()
                if not reducer.is_flushed:
                    reducer.flush()
            if self._schedules.input_steps:
                inputs, changed = self._schedules.inputs(inputs, kwargs, module.training)
                kwargs = dict(changed)
            if self._recomputation.is_undecided:
                self._recomputation.choose(inputs, kwargs)
            inputs = casts.inputs(inputs) if casts.casts_inputs else inputs
            with self._conductor.phase("forward", (inputs, kwargs)), casts.context() if casts.is_autocast else NOTHING:
                output = module(*inputs, **kwargs)
            if self._zero.hooks is None and is_graded:  # else the hooks on its modules watch their outputs
                self.watch.watch(output)
            if self._sequence_loss is not None:
                self._sequence_loss.note_forward(kwargs, output)
            return output

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale, for `engine.scale(loss).backward()`."""
        return self._conductor.scaled(loss)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Tensor:
        """Backward of the loss (a scalar), divided by the micro-batches of a step unless told not to.

        Returns that divided loss. Collective at stages 2 and 3, and at the boundary.
        """
        self._conductor.check_loss(loss)
        self.losses = loss.detach()
        num_micro_batches = self.accumulation.num_micro_batches
        divided = loss / num_micro_batches if scale_wrt_gas and num_micro_batches > 1 else loss
        with self._conductor.phase("backward", self.losses):
            self._reducer.hide()
            num_begun = self.watch.num_begun
            self.scale(divided).backward(retain_graph=retain_graph, **kwargs)
            self.watch.end()
            if self.watch.num_begun == num_begun:  # nothing of the model was reached here, but may be on other ranks
                self._reducer.expect_round()
                self.watch.stand_in()
        return divided

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch; at the boundary update the weights and the learning rate. Collective at the boundary.

        Raises TrainingStateError before any backward, and inside `no_sync`.
        """
        with HELD:
            self._conductor.check_step()
            self._was_step_applied = False
            self._conductor.end_micro_batch(lambda: self._step_at_boundary(lr_kwargs or {}))

    def _step_at_boundary(self, lr_kwargs: dict[str, Any]) -> None:
        self._schedules.learning_rate.take(lr_kwargs, self.train_batch_size())  # before the weights change
        self._was_step_applied = self._conductor.update()
        progress = Progress(
            global_steps=self.global_steps + 1,
            global_samples=self.global_samples
            + self._micro_batch_size * self.accumulation.num_micro_batches * self.dp_world_size,
            skipped_steps=self.skipped_steps + (not self._was_step_applied),
        )
        self._schedules.step(progress, self._was_step_applied)
        self._conductor.learn_order()
        self.global_steps, self.global_samples = progress.global_steps, progress.global_samples
        self.skipped_steps = progress.skipped_steps
        facts = self._step_facts(progress) if self._observers else None
        for observer in self._observers:
            assert facts is not None, "made where somebody watches"
            observer.step_ended(facts)


class Conductor:
    """What is the same around the phases of every engine."""

    def __init__(self, parts: Parts, watching: Watching) -> None:
        self._zero, self._accumulation, self._mesh = parts.zero, parts.accumulation, parts.mesh
        self._advice, self._observers = watching.advice, watching.observers
        self._reducer, self._watch = parts.zero.reducer, parts.zero.watch
        self._sequence_loss = parts.sequence_loss
        self._knows_order = len(self._reducer.gradients) < 2

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale; the backward that begins next is known to be scaled. Under sequence parallelism also
        times what makes the average of gradients the whole sequence's; collective the first time."""
        if self._sequence_loss is not None:
            loss = self._sequence_loss.weighted(loss)
        guard = self._zero.scale_guard
        guard.is_scaled = True
        return guard.scale.times(loss) if guard.scale.scale != 1.0 else loss

    def end_micro_batch(self, at_boundary: Callable[[], None]) -> None:
        """Count a micro-batch; call `at_boundary` where it completes a step, else start reducing what it left."""
        self._watch.end()
        self.reload_states()
        self._accumulation.is_stepping = True
        ends_step = self._accumulation.is_boundary
        try:
            if ends_step:
                at_boundary()
            else:
                self._reducer.flush()
        finally:
            self._accumulation.is_stepping = False
        self._accumulation.count(ends_step)
        self._reducer.saw_micro_batch = False

    def update(self) -> bool:
        """Update the weights; whether they were, rather than the step skipped. Collective."""
        optimizer = self._zero.optimizer
        assert optimizer is not None, "checked by check_step"
        with self.phase("step"):
            optimizer.step()
        return not optimizer.overflow

    def learn_order(self) -> None:
        """After the first step, launch reductions in the order in which the first rank's gradients arrived."""
        if not self._knows_order:
            self._knows_order = True
            rounds = self._reducer.rounds
            rounds.set_order(self._mesh.gather_objects("average", rounds.completion_order())[0])

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what was put away, if anything."""
        put_away = self._zero.put_away
        if put_away is not None and put_away.copies:
            put_away.bring_back(non_blocking)

    @contextlib.contextmanager
    def phase(self, name: str, value: Any = None) -> Iterator[None]:
        """A part of the step, as a span and for the observers."""
        # Without a profiler nobody sees a span, which takes 4 us.
        is_seen = torch.autograd._profiler_enabled()
        with torch.profiler.record_function(f"engine.{name}") if is_seen else NOTHING:
            try:
                for observer in self._observers:
                    observer.begins(name, value)
                try:
                    yield
                finally:
                    for observer in reversed(self._observers):
                        observer.ends(name)
            except RuntimeError as error:
                self._advice.raise_explained(error, name)
                raise

    def check_loss(self, loss: Any) -> None:
        """Refuse what has no backward."""
        if self._zero.optimizer is None:
            raise TrainingStateError(
                'engine.backward: the engine has no optimizer.\n  Pass optimizer=... or add an "optimizer" section to train.'
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingStateError(
                f"engine.backward: the loss must be a scalar tensor, got {got}.\n  Reduce it, e.g. loss.mean()."
            )
        if not loss.requires_grad:
            raise TrainingStateError(
                "engine.backward: the loss does not require grad: it was computed under torch.no_grad(), detached, or all "
                "parameters are frozen."
            )
        if self._sequence_loss is not None:
            self._sequence_loss.note_loss(loss)

    def check_step(self) -> None:
        """Refuse a step out of turn; zeros stand in for a backward that this rank has not seen. Collective where it has not."""
        if self._accumulation.no_sync_depth:
            raise TrainingStateError("engine.step() inside of engine.no_sync().\n  Leave the context first.")
        if self._zero.optimizer is None:
            raise TrainingStateError("engine.step(): the engine has no optimizer, it can only evaluate.")
        takeover = self._zero.optimizer.takeover
        if self._reducer.saw_micro_batch or (takeover and takeover.has_left_gradients) or not self._reducer.gradients:
            return
        if self._mesh.size("average") > 1:
            self._stand_in()
        elif not self._reducer.saw_backward:
            raise TrainingStateError(takeover.why_nothing_arrived() if takeover else NO_BACKWARD)

    def _stand_in(self) -> None:
        """No gradient reached this rank in this micro-batch. Others may wait in their backward for its part, which is zeros;
        if nobody had a backward all learn of it in the step."""
        self._reducer.expect_round(was_seen=False)
        self._zero.scale_guard.is_scaled = True
        self._watch.stand_in()
