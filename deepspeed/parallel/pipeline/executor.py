"""Carries a list of actions out: one rank's row, on real stages.

Made by the pipeline engine. In which order is not decided here: lists are made in `schedules/` and `generate.py`. Stands on the list (`actions`), the hops (`mail`) and late weight gradients (`weights`). It knows
neither the engine nor ZeRO: what a stage is, how a loss is made and how a backward is run are handed in (`Work`).

    F   inputs from the stage before (or the loader) -> the stage -> outputs to the one after, or the loss
    B   gradients from the one after (or the loss) -> backward -> gradients of the inputs to the one before
    I   the same, weight gradients of linear layers put off
    W   those

Invariant: a parameter's gradients are accumulated in the order of micro-batches wherever its list has them in that order, as
one process does that accumulates; so are the bits. A failure ends every rank of the pipeline with the same words.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepspeed.parallel.pipeline.actions import Action, Actions, Op
from deepspeed.parallel.pipeline.form import unpack
from deepspeed.parallel.pipeline.late_weight_gradients import Later, Queue
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.mail import Mail
from deepspeed.parallel.pipeline.routes import Key
from deepspeed.parallel.pipeline.saved import Saved
from deepspeed.utils.errors import DeepSpeedError

_NOTHING = contextlib.nullcontext()


class Work(Protocol):
    """What is done at a stage; the engine's."""

    def load(self, micro: int) -> Any:
        """The first stage's inputs."""

    def forward(self, stage: int, inputs: Any) -> Any:
        """A stage's outputs."""

    def loss(self, outputs: Any, micro: int) -> Tensor:
        """Of the last stage's outputs, scaled for backward where there will be one; noted for the report."""

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Autograd's backward, under the engine's watch."""

    def trains(self, stage: int) -> bool:
        """Whether the stage has parameters that train."""


class Done(NamedTuple):
    """An action that was carried out, in seconds of this rank's clock; `waited_s` of it for another rank."""

    action: Action
    start_s: float
    end_s: float
    waited_s: float


@dataclass
class Alive:
    """A micro-batch at a stage, from its forward to the end of its backward."""

    inputs: list[Tensor | None]
    is_tuple: bool
    outputs: list[Tensor | None] = field(default_factory=list)
    loss: Tensor | None = None
    queue: Queue = field(default_factory=Queue)
    handed: set[int] = field(default_factory=set)
    """Which objects the stage was given, while its forward runs."""


class Executor:
    """One rank's hands. `rank`: its place in the pipeline."""

    def __init__(self, rank: int, mail: Mail, work: Work) -> None:
        self._rank, self._mail, self._work = rank, mail, work
        self._alive: dict[tuple[int, int], Alive] = {}
        self._current = Queue()
        self._owed: dict[int, list[Queue]] = {}
        """By stage, what was put off and not run, in the order of micro-batches."""
        self._later = Later(lambda: self._current)
        self.actions = Actions((), (), 0)
        """The last list."""
        self.done: list[Done] = []
        """What this rank did of it."""
        self.peak_alive = 0
        """Most micro-batches alive at once on this rank in the last list."""
        self.measures = False
        """Whether the next list notes `saved_bytes`."""
        self.saved_bytes: dict[int, int] = {}
        """By stage, what autograd kept of a micro-batch, the most there was."""

    def run(self, actions: Actions, drive: Callable[[Callable[[Action], None]], None] | None = None) -> None:
        """Carry this rank's row out. Raises PipelineError if this rank fails, or one that it waits for; others may be done by then, with
        messages on their way that nobody takes: the caller waits for all of them, or has them drained, when it knows.

        drive: goes through the row itself, with something in between; it is given what carries an action out."""
        self.actions = actions
        self._mail.begin(actions)
        self._alive.clear()
        self._owed.clear()
        self.done, self.peak_alive, self.saved_bytes = [], 0, {}
        row = actions.lists[self._rank]
        trains = any(action.op is not Op.FORWARD for action in row)
        puts_off = any(action.op is Op.WEIGHT for action in row)
        action: Action | None = None

        def do(given: Action) -> None:
            nonlocal action
            action = given
            start, waited = time.perf_counter(), self._mail.waited_s
            self._carry_out(actions, action, trains, puts_off)
            self.peak_alive = max(self.peak_alive, len(self._alive))
            self.done.append(Done(action, start, time.perf_counter(), self._mail.waited_s - waited))

        try:
            if drive is not None:
                drive(do)
            else:
                for given in row:
                    do(given)
        except BaseException as error:
            self._mail.tell_failure(self._words(error, action))
            self._alive.clear()
            raise

    def _words(self, error: BaseException, action: Action | None) -> str:
        if isinstance(error, PipelineError):
            return str(error)
        return f"pipeline rank {self._rank} failed at {action}: {type(error).__name__}: {error}"

    def _carry_out(self, actions: Actions, action: Action, trains: bool, puts_off: bool) -> None:
        if action.op is Op.FORWARD:
            self._forward(actions, action, trains, puts_off)
        elif action.op is Op.WEIGHT:
            queue = self._alive.pop((action.stage, action.micro)).queue
            self._owed[action.stage].remove(queue)
            queue.run()
        else:
            self._backward(actions, action, puts_off)

    # Forward. ------------------------------------------------------------------------------------------------------

    def _forward(self, actions: Actions, action: Action, trains: bool, puts_off: bool) -> None:
        stage, micro = action.stage, action.micro
        alive = self._inputs(actions, stage, micro, trains)
        is_last = stage == actions.num_stages - 1
        saved = Saved()
        # Around the stage alone: under a function mode each call of torch, those of messages too, goes through Python.
        with self._later if puts_off else _NOTHING, saved if self.measures else _NOTHING:
            output = self._outputs(stage, micro, alive)
            if is_last:
                alive.loss = self._work.loss(output, micro)
        if self.measures:
            self.saved_bytes[stage] = max(saved.nbytes, self.saved_bytes.get(stage, 0))
        if not is_last:
            values, is_tuple = unpack(output, f"stage {stage}")
            if trains:
                self._check_gradients(stage, values, alive)
            alive.outputs = values
            self._mail.send(actions.rank_of[stage + 1], Key(stage + 1, micro, True), values, is_tuple)
        if trains:
            self._alive[stage, micro] = alive

    def _outputs(self, stage: int, micro: int, alive: Alive) -> Any:
        if stage == 0:
            return self._work.forward(stage, self._work.load(micro))
        own = [_writable(value) for value in alive.inputs]
        alive.handed = {id(value) for value in own if value is not None}
        return self._work.forward(stage, tuple(own) if alive.is_tuple else own[0])

    def _inputs(self, actions: Actions, stage: int, micro: int, trains: bool) -> Alive:
        if stage == 0:
            return Alive([], False)
        parcel = self._mail.receive(Key(stage, micro, True), actions.rank_of[stage - 1])
        for value, described in zip(parcel.values, parcel.form.values, strict=True):
            if value is not None and described.has_gradient and trains:
                value.requires_grad_()
        return Alive(parcel.values, parcel.form.is_tuple)

    def _check_gradients(self, stage: int, values: list[Tensor | None], alive: Alive) -> None:
        """Refuse floating outputs that lost their gradient."""
        if not self._work.trains(stage) and not any(v is not None and v.requires_grad for v in alive.inputs):
            return
        if any(v is not None and v.is_floating_point() and v.requires_grad for v in values):
            lost = [
                i
                for i, v in enumerate(values)
                if v is not None and v.is_floating_point() and not v.requires_grad and id(v) not in alive.handed
            ]
        else:
            lost = [i for i, v in enumerate(values) if v is not None and v.is_floating_point()][:1] or [0]
        if lost:
            raise DeepSpeedError(
                f"value {lost[0]} that stage {stage} returns is a floating tensor without gradient: the stages before would not "
                "be trained by what depends on it.\n  Do not detach it, or hand on integers or booleans where no gradient is meant."
            )

    # Backward. -----------------------------------------------------------------------------------------------------

    def _backward(self, actions: Actions, action: Action, puts_off: bool) -> None:
        stage, micro = action.stage, action.micro
        alive = self._alive[stage, micro]
        if alive.loss is not None:
            roots: list[Tensor] = [alive.loss] if alive.loss.requires_grad else []
            gradients: list[Tensor | None] = [None] * len(roots)
        else:
            parcel = self._mail.receive(Key(stage, micro, False), actions.rank_of[stage + 1])
            roots = [v for v in alive.outputs if v is not None and v.requires_grad]
            gradients = list(parcel.values)
        alive.outputs, alive.loss = [], None
        self._current = alive.queue
        if roots:
            with self._later if puts_off else _NOTHING:
                self._work.backward(roots, gradients)
        if stage > 0:
            self._send_gradients(actions, action, alive)
        owed = self._owed.setdefault(stage, [])
        if action.op is Op.INPUT:
            owed.append(alive.queue)
        elif (
            owed
        ):  # ZB-V: a whole backward overtakes weight gradients of earlier micro-batches, which come first in the sum
            owed[-1].take_over(alive.queue)
        else:
            alive.queue.run()
        alive.inputs = []
        if action.op is Op.BACKWARD:
            del self._alive[stage, micro]

    def _send_gradients(self, actions: Actions, action: Action, alive: Alive) -> None:
        wanted = [v for v in alive.inputs if v is not None and v.requires_grad]
        values: list[Tensor | None] = [v.grad if v.grad is not None else torch.zeros_like(v) for v in wanted]
        for value in wanted:
            value.grad = None
        before = action.stage - 1
        self._mail.send(actions.rank_of[before], Key(before, action.micro, False), values, True)


class _Alias(torch.autograd.Function):
    """The same values as a tensor that is no view, so that a stage may begin with an operation in place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _writable(value: Tensor | None) -> Tensor | None:
    """What a stage gets for a leaf that gathers its gradient."""
    return _Alias.apply(value) if value is not None and value.requires_grad else value
