"""Batches of a pipeline that nobody waits for at their end: `pipeline.post_validation`.

Mixed into the pipeline engine. There a batch begins and ends with words that all ranks tell each other; here a rank whose list is done
steps (`zero.late`) and begins its next batch, while ranks that end later still work on this one. What was decided there together is
learned here on the way:

    who has no batch, who fails     the failure travels in place of messages; the step's sum tells those who have gone on
    the loss                        sent by the last stage when it has it, received when a rank's list is done
    norm and overflow               with the step's sum, asked for before the next batch's first loss or backward on this rank

If the step is another than it was made as, its rank ends the list that it is in, as by a failure, so that all do; the step is made
right, messages under way are taken, buffers and random states put back, and the batch begins again. By then no gradient was made, since
losses and backward passes come after the question.

Invariant: losses, norms and weights have the bits of batches that wait. Methods that read weights or states settle the step first;
those that read its numbers wait for its sum alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.engine.pipeline_batch import ENDED, Batch, pull
from deepspeed.mesh import Mesh
from deepspeed.parallel.pipeline.actions import Action
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.utils.errors import DeepSpeedConfigError, TrainingStateError
from deepspeed.zero.late import LateStep, Verdict

Engine = Any
"""`deepspeed.engine.pipeline.PipelineEngine`, which imports this file."""


class _AgainError(PipelineError):
    """The list ends here: the weights are others than it was begun with."""


class LossMail:
    """The batch's loss, from the rank of the last stage to the others of its pipeline. One message per list, also of one that fails.

    Collective over the job to make."""

    def __init__(self, mesh: Mesh, owner: int, device: torch.device) -> None:
        self._group = mesh.group("pipeline", "late_loss", "gloo")
        self._ranks, self._rank, self._device = mesh.ranks("pipeline"), mesh.rank("pipeline"), device
        self._owner = owner
        self._under_way: list[tuple[Any, Tensor]] = []
        self._is_sent = True
        self._loss: Tensor | None = None

    def begin(self) -> None:
        """Before a list."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way, self._is_sent, self._loss = [], False, None
        if self._group is not None and self._rank != self._owner:
            message = torch.empty(2, dtype=torch.float64)
            self._under_way = [(dist.irecv(message, self._ranks[self._owner], group=self._group), message)]

    def send(self, loss: Tensor | None) -> None:
        """Tell the others, once; None: the list failed before there was one."""
        if self._is_sent or self._rank != self._owner:
            return
        self._is_sent, self._loss = True, loss
        said = (float("nan"), -1.0) if loss is None else (loss.item(), float(loss.dim()))
        message = torch.tensor(said, dtype=torch.float64)
        for rank in self._ranks if self._group is not None else ():
            if rank != self._ranks[self._owner]:
                self._under_way.append((dist.isend(message, rank, group=self._group), message))

    def end(self) -> Tensor | None:
        """The loss, fp32 on the CPU, of whatever shape it has; waited for."""
        if self._rank == self._owner:
            self.send(None)
            return self._loss
        ((work, message),) = self._under_way
        self._under_way = []
        work.wait()
        value, num_dims = message.tolist()
        return None if num_dims < 0 else torch.tensor(value, dtype=torch.float32).reshape((1,) * int(num_dims))


class _Mark(NamedTuple):
    """What a list that is begun again finds as it was."""

    buffers: list[tuple[Tensor, Tensor]]
    forwards: dict[int, int]
    random: Tensor
    device_random: Any

    def put_back(self, engine: Engine) -> None:
        """Undo what a list's forward passes have left."""
        for buffer, value in self.buffers:
            buffer.copy_(value)
        engine.module._num_forwards.update(self.forwards)
        torch.set_rng_state(self.random)
        if self.device_random is not None:
            get_accelerator().set_rng_state(self.device_random)


def _mark(engine: Engine) -> _Mark:
    device_random = get_accelerator().get_rng_state() if engine.device.type != "cpu" else None
    buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
    return _Mark(buffers, dict(engine.module._num_forwards), torch.get_rng_state(), device_random)


class LateBatches:
    """The batches of one engine, and the step that the last of them left open. Collective to make.

    Raises DeepSpeedConfigError for what the option does not go with.
    """

    def __init__(self, engine: Engine) -> None:
        _check(engine)
        assert engine.zero_optimizer is not None, "checked"
        self._engine, self._mesh = engine, engine.mesh
        self._step = LateStep(engine.zero_optimizer, engine.mesh)
        self._losses = LossMail(engine.mesh, engine.module.rank_of[-1], engine.device)
        self._owed: Verdict | None = None
        """What the ranks of the pipeline have learned, while lists that were begun before are to be ended."""
        self._is_counted = True
        """Whether schedules know of the last step."""
        self.num_redone = 0
        """Steps that were clipped or skipped after all."""
        self._counts = (0, 0)
        """Steps and samples before it."""
        engine._work.before_gradients = self._validate
        engine._work.on_last_loss = self._tell_loss

    # A batch. ------------------------------------------------------------------------------------------------------

    def train(self) -> Tensor:
        """One batch, and its step; the loss, the same on every rank."""
        engine = self._engine
        num_micro = engine.accumulation.num_micro_batches
        batch, unread = pull(engine._data_iterator, num_micro, engine.batch_fn, is_needed=engine._reads_data)
        engine.watch.end()
        engine._conductor.reload_states()
        engine._reducer.hide()
        engine._reducer.flush()
        with engine._conductor.phase("forward", ((), {})):
            loss = self._compute(batch, num_micro, unread)
        engine._additional = engine._mean_additional()
        mean = loss
        if self._mesh.size("average") > 1:
            dist.all_reduce(mean, group=self._mesh.group("average", "control", "gloo"))
            mean /= self._mesh.size("average")
        engine.agg_train_loss = engine.losses = mean.to(engine.device)
        with engine._conductor.phase("backward", engine.losses):
            engine._reducer.flush()
        self._begin_step()
        return engine.agg_train_loss

    def _begin_step(self) -> None:
        engine = self._engine
        engine.accumulation.is_stepping = True
        try:
            engine._schedules.learning_rate.take({}, engine.train_batch_size())
            with engine._conductor.phase("step"):
                self._step.begin()
        finally:
            engine.accumulation.is_stepping = False
        num_samples = engine._micro_batch_size * engine.accumulation.num_micro_batches * engine.dp_world_size
        self._counts = engine.global_steps, engine.global_samples
        engine.global_steps, engine.global_samples = engine.global_steps + 1, engine.global_samples + num_samples
        engine.accumulation.num_micro_batches = engine.accumulation.asked
        self._is_counted = False

    def _compute(self, batch: Batch, num_micro: int, unread: Exception | None) -> Tensor:
        engine = self._engine
        mark = _mark(engine) if self._step.is_pending or self._owed else None
        while True:
            self._losses.begin()
            engine._work.begin(batch.inputs, batch.labels, num_micro)
            failure = self._attempt(num_micro, unread)
            engine._work.end()
            loss = self._losses.end()
            if self._owed is None:
                break
            self._end_lists()
            assert mark is not None, "a step was pending"
            mark.put_back(engine)
        failure = self._agree_here(failure)
        if failure is not None:
            engine._reducer.drop()
            self._step.begin_failed()
            self._owed = self._step.settle()
            self._end_lists(failure)
        assert loss is not None, "the list was carried out"
        return loss

    def _attempt(self, num_micro: int, unread: Exception | None) -> Exception | None:
        """The list, once; what it failed with."""
        engine, failure = self._engine, None
        engine.accumulation.no_sync_depth += 1
        try:
            with engine._reducer.hold():
                try:
                    if self._owed is not None or unread is not None:
                        stops = _stopper(unread or _AgainError("the step before was made again"))
                        engine._executor.run(engine._lists.of(num_micro), stops)
                    elif (own := engine._own_schedule(num_micro)) is not None:
                        engine._exec_schedule(own)
                    else:
                        engine._executor.run(engine._lists.of(num_micro))
                    self._validate()
                except Exception as error:
                    failure = error
                    if self._step.is_pending:
                        failure = self._settle_after(error)
                if failure is None:
                    engine._reducer.flush()
                    failure = self._sum_ties()
                elif self._owed is None:
                    self._sum_ties(is_failed=True)  # the other owners ask
        finally:
            engine.accumulation.no_sync_depth -= 1
        return failure

    def _settle_after(self, error: Exception) -> Exception:
        try:
            self.settle()
        except Exception as other:
            return other
        return error

    def _sum_ties(self, *, is_failed: bool = False) -> Exception | None:
        """Gradients of shared parameters; none where one of their owners failed. Collective over the owners."""
        engine, had_failed = self._engine, is_failed
        for tie in engine.module.ties:
            if tie.group is not None:
                flag = torch.tensor([int(is_failed)], device=engine.device)
                dist.all_reduce(flag, group=tie.group)
                is_failed = bool(flag.item())
                if not is_failed:
                    engine._sum_tie(tie)
        return (
            PipelineError("a rank that has the same tied parameters failed") if is_failed and not had_failed else None
        )

    def _agree_here(self, failure: Exception | None) -> Exception | None:
        """Ranks that average gradients fail together. Collective over them."""
        failed = [theirs for (theirs,) in self._mesh.agree("average", int(failure is not None))]
        if failure is None and any(failed):
            rank = self._mesh.ranks("average")[failed.index(1)]
            return PipelineError(f"rank {rank} failed, in another pipeline of the same step")
        return failure

    def _end_lists(self, failure: Exception | None = None) -> None:
        """After lists that all ranks of the pipeline have ended: take what is on its way; where a rank had failed raise on
        all. Collective over the pipeline, or over the job."""
        verdict, self._owed = self._owed, None
        lost, self._step.lost = self._step.lost, None
        logs, losses = zip(*self._mesh.gather_objects("pipeline", (self._engine._mail.log, lost)), strict=True)
        self._engine._mail.drain(list(logs))
        what = next(filter(None, losses), "")
        if verdict is not Verdict.FAILED:
            if what:
                raise TrainingStateError(what)
            return
        told = (ENDED if isinstance(failure, StopIteration) else None, _words(failure))
        everyone = self._mesh.gather_objects("job", told)
        if any(status == ENDED for status, _ in everyone):
            raise StopIteration("the data loader has no batch left.")
        if failure is not None:
            raise failure
        rank, words = next((rank, words) for rank, (_, words) in enumerate(everyone) if words is not None)
        raise PipelineError(
            f"rank {rank} failed, and the step was taken back: {words}" + (what and f"\nBesides, {what}")
        )

    # What is learned late. -----------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Before the first loss or backward of a list: know whether it was begun with the right weights."""
        if self._step.is_pending:
            self.settle()
        if self._owed is not None:
            raise _AgainError("the step before was made again")

    def _tell_loss(self, losses: list[Tensor]) -> None:
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        self._losses.send((total / len(losses)).cpu())

    def decide(self) -> None:
        """Wait for the step's sum, so that norm, overflow, loss scale and learning rate are what they should be. Asks nobody
        for anything."""
        if self._step.is_pending and not self._is_counted and self._step.decide():
            engine = self._engine
            assert engine.zero_optimizer is not None, "checked"
            engine._was_step_applied = not engine.zero_optimizer.overflow
            engine._skipped_steps += not engine._was_step_applied
            self._is_counted = True
            engine._schedules.step(engine._progress(), engine._was_step_applied)

    def settle(self) -> None:
        """Have weights and states be what they should be. Collective over the ranks that average."""
        if not self._step.is_pending:
            return
        try:
            self.decide()
        finally:
            verdict = self._step.settle()
        if verdict is Verdict.FAILED:
            self._engine.global_steps, self._engine.global_samples = self._counts
        else:
            self._engine._conductor.learn_order()
        self.num_redone += verdict is Verdict.REDONE
        if verdict is not Verdict.STOOD:
            self._owed = verdict

    def settle_all(self) -> None:
        """The same between batches, where all ranks are at the same place of their script. Collective over the job."""
        self.settle()
        if self._owed is not None:
            self._end_lists()
        self._engine._mail.wait_sent()


def settles_first(cls: type[T]) -> type[T]:
    """Have an engine's methods that read what a step changes settle it before."""
    for names, prepares in ((_READ_NUMBERS, LateBatches.decide), (_READ_WEIGHTS, LateBatches.settle_all)):
        for name in names:
            setattr(cls, name, _after(getattr(cls, name), prepares))
    return cls


def _after(method: Callable[..., Any], prepares: Callable[[LateBatches], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def settled(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if engine._late is not None:
            prepares(engine._late)
        return method(engine, *args, **kwargs)

    return settled


T = TypeVar("T")
_READ_NUMBERS = ("get_global_grad_norm", "get_lr", "get_mom", "loss_scale", "was_step_applied")
_READ_WEIGHTS = (
    "eval_batch", "save_checkpoint", "load_checkpoint", "module_state_dict", "load_module_state_dict", "save_16bit_model",
    "offload_states", "destroy",
)  # fmt: skip


def _stopper(error: Exception) -> Callable[[Callable[[Action], None]], None]:
    def stop(do: Callable[[Action], None]) -> None:
        raise error

    return stop


def _words(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    return str(failure) if isinstance(failure, PipelineError) else f"{type(failure).__name__}: {failure}"


def _check(engine: Engine) -> None:
    """Refuse by name."""
    config, mesh = engine._config, engine.mesh
    refused = {
        "zero_optimization.stage 3, whose parameters are gathered for a batch that would begin before the step is sure": (
            config.zero_optimization.stage == 3
        ),
        "tensor parallelism inside of stages": mesh.size("tensor") > 1,
        "parts of sequences inside of stages": mesh.size("sequence") > 1,
        "experts on other ranks": mesh.size("experts") > 1,
        "what changes weights after an update (compression, sparsity)": bool(engine._schedules.on_update),
        "an engine without optimizer": engine.zero_optimizer is None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise DeepSpeedConfigError(
                f"pipeline.post_validation does not go with {what}.\n  Leave one of them out: without the key each step waits for "
                "its norm."
            )
