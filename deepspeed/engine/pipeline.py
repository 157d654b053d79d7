"""The engine of a model that is cut in depth: what `deepspeed.initialize` returns for a `PipelineModule`.

A second facade over the parts that `engine.engine` is built of. Where that one is driven by calls of forward, backward and
step, this one has a list of actions carried out per batch (`parallel.pipeline.executor`):

    train_batch     take the batch on first and last rank    pipeline_batch
                    the list, with backward held open        parallel.pipeline.executor over pipeline_work
                    sum gradients of tied parameters         parallel.pipeline.tied
                    reduce once, step as ever                Conductor.update
                    tell all ranks the loss

At ZeRO stage 3 the parameters of a rank's stages stay gathered for the batch where `stage3_max_live_parameters` allows.

Invariant: gradients leave a rank once per batch, after its last weight gradient, whatever the schedule.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.activation import checkpoint, non_reentrant_checkpoint
from deepspeed.comm.interrupts import HELD
from deepspeed.config import load_config
from deepspeed.engine import pipeline_trace
from deepspeed.engine.build import Parts, Watching
from deepspeed.engine.data import DeepSpeedDataLoader, RepeatingLoader
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.engine.facts import RunFacts
from deepspeed.engine.pipeline_batch import take
from deepspeed.engine.pipeline_instructions import Instructed
from deepspeed.engine.pipeline_late import LateBatches, settles_first
from deepspeed.engine.pipeline_lists import Lists
from deepspeed.engine.pipeline_places import Places
from deepspeed.engine.pipeline_work import StageWork
from deepspeed.mesh import Mesh
from deepspeed.parallel.pipeline.actions import Actions
from deepspeed.parallel.pipeline.executor import Done, Executor
from deepspeed.parallel.pipeline.layers import PipelineError
from deepspeed.parallel.pipeline.mail import Mail, Post
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.schedules import inference
from deepspeed.parallel.pipeline.tied import Tie, sum_over_owners
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError
from deepspeed.utils.schedule import Progress
from deepspeed.zero.param import full_numel

_NO_LOSSES = PipelineModule.get_additional_losses
_ONLY = "Only train_batch() is accessible in pipeline mode."


@settles_first
class PipelineEngine(Instructed, Places, DeepSpeedEngine):
    """A PipelineModule under ZeRO. Every method that trains or evaluates is collective over the job."""

    module: PipelineModule

    def __init__(self, args: Any = None, model: Any = None, mpu: Any = None, **kwargs: Any) -> None:
        if mpu is not None:
            raise DeepSpeedConfigError(
                "mpu= does not go with a PipelineModule, which has its own (model.mpu()).\n  Give the module a topology with "
                'a "model" axis, e.g. PipeModelDataParallelTopology.'
            )
        self.batch_fn: Callable[[Any], Any] | None = None
        stages = load_config(kwargs["config"]).pipeline.stages
        if stages not in ("auto", model.num_stages):
            raise DeepSpeedConfigError(
                f"pipeline.stages = {stages}, but the PipelineModule has num_stages = {model.num_stages}.\n  Give one of them."
            )
        self._data_iterator: Iterator[Any] | None = None
        self._late: LateBatches | None = None
        super().__init__(args=args, model=model, mpu=model.mpu(), **kwargs)
        self.grid = self.module.mpu()
        self.num_stages = self.module.num_stages
        self.stage_id = self.module.stage_id
        self.agg_train_loss: Tensor | None = None
        self._additional: dict[str, Tensor] = {}
        self._choose_checkpointing()
        if self.training_dataloader is not None:
            self.set_dataloader(self.training_dataloader)
        self._lists.agree(self.gradient_accumulation_steps(), self.mesh)  # refuses now what cannot run
        if self._config.pipeline.post_validation:
            self._late = LateBatches(self)

    def _take(self, model: Any, parts: Parts, watching: Watching) -> None:
        super()._take(model, parts, watching)
        mesh = parts.mesh
        self._mail = Mail(_post_of(mesh, self._device))
        self._work = StageWork(model, parts, self._device)
        self._executor = Executor(mesh.rank("pipeline"), self._mail, self._work)
        self._lists = Lists(self._config.pipeline, model)
        self._num_of_all_stages = self._count_all_stages()

    def _run_facts(self) -> RunFacts:
        return dataclasses.replace(super()._run_facts(), num_parameters=self._num_of_all_stages)

    def _count_all_stages(self) -> int:
        """Elements of all stages' parameters, tied ones once. Collective over the pipeline."""
        tied = [p for p in self.module.parameters() if getattr(p, "ds_pipe_replicated", False)]
        own = self.num_parameters() - sum(map(full_numel, tied))
        return int(sum(self.mesh.gather_objects("pipeline", own)))

    def _choose_checkpointing(self) -> None:
        section = self._config.pipeline
        if section.activation_checkpoint_interval > 0:
            self.module.set_checkpoint_interval(section.activation_checkpoint_interval)
        if not section.use_reentrant:
            self.module.activation_checkpoint_func = non_reentrant_checkpoint
        elif not self.module.has_own_checkpoint_func:
            self.module.activation_checkpoint_func = checkpoint

    def _reentrant_activation_checkpointing(self) -> bool:
        """Whether layers are recomputed by the reentrant kind of checkpoint."""
        return self.module.activation_checkpoint_interval > 0 and self._config.pipeline.use_reentrant

    # The list. -----------------------------------------------------------------------------------------------------

    @property
    def actions(self) -> Actions:
        """What `train_batch` carries out: print it, or write `actions.to_csv()` to a file."""
        return self._lists.of(self.gradient_accumulation_steps())

    @property
    def actions_done(self) -> list[Done]:
        """What this rank did in the last batch, with times and waits."""
        return self._executor.done

    # Training. -----------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One step on `gradient_accumulation_steps` micro-batches (inputs, labels); the mean loss, the same on every rank.

        First and last stage take the same positions of their iterators; others need none. Raises RuntimeError under no_grad,
        PipelineError on all ranks if one fails, StopIteration on all where the data has ended.
        """
        if not torch.is_grad_enabled():
            raise PipelineError(
                "train_batch() requires gradients, but they are disabled.\n  Use eval_batch() to evaluate."
            )
        if self.zero_optimizer is None:
            self._conductor.check_step()
        if data_iter is not None:
            self._data_iterator = data_iter
        self.module.train()
        with HELD:
            if self._late is not None and not self._lists.measures:
                return self._train_late(self._late)
            return self._train_now()

    def _train_now(self) -> Tensor:
        num_micro = self.accumulation.num_micro_batches
        batch = take(self.mesh, self._data_iterator, num_micro, self.batch_fn, is_needed=self._reads_data)
        self.watch.end()
        self._conductor.reload_states()
        self._reducer.hide()
        self._reducer.flush()
        self._work.begin(batch.inputs, batch.labels, num_micro)
        self._executor.measures = self._lists.measures
        with self._conductor.phase("forward", ((), {})):
            self._compute(num_micro)
        if self._lists.measures:
            self._lists.learn(self._executor, self._mail, self.mesh)
        self.agg_train_loss = self.losses = self._tell_loss(self._work.losses)
        with self._conductor.phase("backward", self.losses):
            self._reducer.flush()
        self.accumulation.is_stepping = True
        try:
            self._step_at_boundary({})
        finally:
            self.accumulation.is_stepping = False
            self.accumulation.num_micro_batches = self.accumulation.asked
        if pipeline_trace.is_due(self.global_steps, self._executor.actions, self.monitor):
            pipeline_trace.tell(self.global_steps, self._executor.actions, self.actions_done, self.mesh, self.monitor)
        return self.agg_train_loss

    def _train_late(self, late: LateBatches) -> Tensor:
        loss = late.train()
        is_told = pipeline_trace.is_due(self.global_steps, self._executor.actions, self.monitor)
        if self._observers or is_told:  # who watches wants to know what became of each step
            late.settle_all()
            facts = self._step_facts(self._progress()) if self._observers else None
            for observer in self._observers:
                assert facts is not None, "made where somebody watches"
                observer.step_ended(facts)
        if is_told:
            pipeline_trace.tell(self.global_steps, self._executor.actions, self.actions_done, self.mesh, self.monitor)
        return loss

    def _progress(self) -> Progress:
        return Progress(
            global_steps=self.global_steps, global_samples=self.global_samples, skipped_steps=self._skipped_steps
        )

    def settle_step(self) -> None:
        """With `pipeline.post_validation`: wait for the last step's norm, and have the weights be what it makes of them, before a
        script reads or writes them. Collective over the job; without that key, nothing."""
        if self._late is not None:
            self._late.settle_all()

    @property
    def lr_scheduler(self) -> Any:
        """See DeepSpeedEngine."""
        if self._late is not None:
            self._late.decide()
        return self._schedules.learning_rate.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self._schedules.learning_rate.scheduler = scheduler

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because gradients overflowed."""
        if self._late is not None:
            self._late.decide()
        return self._skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped_steps = count

    def _compute(self, num_micro: int) -> None:
        """The list, and the sums of tied gradients. Whatever fails on one rank ends the step on all."""
        failure: Exception | None = None
        self.accumulation.no_sync_depth += 1
        try:
            with self._reducer.hold():
                self._keep_gathered()
                try:
                    own = self._own_schedule(num_micro)
                    if own is not None:
                        self._exec_schedule(own)
                    else:
                        self._executor.run(self._lists.of(num_micro))
                except Exception as error:
                    failure = error
                self._agree_on_failure(failure)
                self._reducer.flush()
                self._sum_ties()
        except Exception:
            self._reducer.drop()
            raise
        finally:
            self.accumulation.no_sync_depth -= 1
            self._work.end()

    def _agree_on_failure(self, failure: Exception | None) -> None:
        failed = [theirs for (theirs,) in self.mesh.agree("job", int(failure is not None))]
        if not any(failed):
            self._mail.wait_sent()
            return
        self._mail.drain(self.mesh.gather_objects("pipeline", self._mail.log))
        words = self.mesh.gather_objects("job", None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        rank = next(rank for rank, text in enumerate(words) if text is not None)
        raise PipelineError(f"rank {rank} failed, in another pipeline of the same step: {words[rank]}")

    def _keep_gathered(self) -> None:
        hooks = self._zero.hooks
        if hooks is None:
            return
        numel = sum(bucket.layout.numel for bucket in hooks.gatherer.buckets)
        if numel <= self._config.zero_optimization.stage3_max_live_parameters:
            hooks.keep_until_step(hooks.gatherer.buckets)

    def _sum_ties(self) -> None:
        for tie in self.module.ties:
            self._sum_tie(tie)

    def _sum_tie(self, tie: Tie) -> None:
        for param in tie.params if tie.group is not None else ():
            total = self._reducer.held_sum(param)
            if total is not None:
                sum_over_owners(tie, total)

    @property
    def _reads_data(self) -> bool:
        return self.is_first_stage() or self.is_last_stage()

    def _tell_loss(self, losses: list[Tensor]) -> Tensor:
        """The mean over micro-batches and ranks that average gradients, from the last stage to all. Collective."""
        is_last, mesh = self.is_last_stage(), self.mesh
        mean = torch.zeros(())
        if is_last:
            total = losses[0]
            for loss in losses[1:]:
                total = total + loss
            mean = (total / len(losses)).cpu()
        named = self._mean_additional()
        if is_last and mesh.size("average") > 1:
            dist.all_reduce(mean, group=mesh.group("average", "control", "gloo"))
            mean /= mesh.size("average")
        if mesh.size("pipeline") > 1:
            owner = mesh.ranks("pipeline")[self.module.rank_of[-1]]
            group = mesh.group("pipeline", "control", "gloo")
            said = [(tuple(mean.shape), named)]
            dist.broadcast_object_list(said, owner, group=group)
            ((shape, last),) = said
            named = {**named, **last}
            mean = mean if is_last else torch.zeros(shape)
            dist.broadcast(mean, owner, group=group)
        self._additional = named
        return mean.to(self._device)

    def _mean_additional(self) -> dict[str, Tensor]:
        """The module's further losses at this rank's stages, averaged like the loss. Collective where there may be any."""
        named = {name: (value / self._work.num_micro).cpu() for name, value in self._work.additional.items()}
        if self.mesh.size("average") == 1 or type(self.module).get_additional_losses is _NO_LOSSES:
            return named
        everyone = self.mesh.gather_objects("average", named)
        values = {
            name: [theirs[name] for theirs in everyone if name in theirs] for theirs in everyone for name in theirs
        }
        return {name: sum(found[1:], found[0]) / len(found) for name, found in values.items()}

    def get_additional_losses(self) -> dict[str, Tensor]:
        """The module's further losses of the last batch, averaged over its micro-batches and ranks that share no batch: those of the
        last stage on all ranks, and this rank's own."""
        return self._additional

    # Evaluation. ---------------------------------------------------------------------------------------------------

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Loss (or outputs) without gradients of `num_micro_batches`, default a step's. The model stays in evaluation mode.

        reduce_output: "avg" for the mean over micro-batches and data-parallel ranks; None for the list, on the last stage.
        bcast_loss: whether other stages get it too, else None. return_logits: (loss, the last micro-batch's outputs, None but
        on the last stage). Raises NotImplementedError for another `reduce_output`, PipelineError for no micro-batches.
        """
        if reduce_output not in ("avg", None):
            raise NotAvailableError(f'eval_batch(reduce_output={reduce_output!r}): use "avg" or None.')
        num_micro = self.gradient_accumulation_steps() if num_micro_batches is None else num_micro_batches
        if num_micro < 1:
            raise PipelineError(
                f"eval_batch(num_micro_batches={num_micro}): use 1 or more, or leave it out for a step's {self.micro_batches}."
            )
        nn_module: torch.nn.Module = self.module
        nn_module.eval()
        batch = take(self.mesh, data_iter, num_micro, self.batch_fn, is_needed=self._reads_data)
        self.watch.end()
        self._conductor.reload_states()
        self._work.begin(batch.inputs, batch.labels, num_micro, compute_loss)
        failure: Exception | None = None
        with torch.no_grad():
            try:
                self._executor.run(inference(self.num_stages, num_micro, self.module.rank_of))
            except Exception as error:
                failure = error
        self._agree_on_failure(failure)
        logits = self._work.outputs
        losses = self._work.losses
        self._work.end()
        result: Any = (losses if self.is_last_stage() else None) if reduce_output is None else None
        if reduce_output == "avg":
            loss = self._tell_loss(losses)
            result = loss if bcast_loss or self.is_last_stage() else None
        return (result, logits) if return_logits else result

    # Data. ---------------------------------------------------------------------------------------------------------

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Train on this iterator from now on."""
        self._data_iterator = iterator

    def set_dataloader(self, loader: Any) -> None:
        """Train on this loader from now on, again from its start where it ends."""
        self.training_dataloader = loader
        self._data_iterator = iter(RepeatingLoader(loader))

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """`fn(what the iterator gives)` is then (inputs, labels)."""
        self.batch_fn = fn

    def deepspeed_io(self, dataset: Any, *args: Any, **kwargs: Any) -> DeepSpeedDataLoader:
        """As the engine's, in the dataset's own order: every stage has to see the same."""
        return super().deepspeed_io(dataset, *args, **{"route": "pipeline", **kwargs})

    # What is asked. ------------------------------------------------------------------------------------------------

    def set_has_attention_mask(self, value: bool) -> None:
        """Any value may be a mask here."""

    def reset_activation_shape(self) -> None:
        """Shapes may change at any time here."""

    @property
    def micro_batches(self) -> int:
        """Per step."""
        return self.gradient_accumulation_steps()

    @property
    def micro_batch_size(self) -> int:
        """Samples per micro-batch."""
        return self.train_micro_batch_size_per_gpu()

    def is_gradient_accumulation_boundary(self) -> bool:
        """True only while gradients are reduced and stepped."""
        return self.accumulation.is_stepping

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises PipelineError."""
        raise PipelineError(_ONLY)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises PipelineError."""
        raise PipelineError(_ONLY)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Raises PipelineError."""
        raise PipelineError(_ONLY)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Raises PipelineError."""
        raise PipelineError(_ONLY)
        yield


class DualPipeVEngine(PipelineEngine):
    """The engine of a `DualPipeVModule`, whose first rank has the first and the last stage.

    Raises DeepSpeedConfigError (an AssertionError and a ValueError) for fewer micro-batches than twice the ranks, unless another
    V-shaped schedule is configured."""

    def __init__(self, args: Any = None, model: Any = None, mpu: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, PipelineModule) or model.placement != "v":
            raise DeepSpeedConfigError(
                f"DualPipeVEngine runs a DualPipeVModule, not a {type(model).__name__}: each rank has two stages, there and back."
            )
        config = load_config(kwargs["config"])
        num_micro, schedule = config.gradient_accumulation_steps, config.pipeline.schedule
        if schedule in ("auto", "dualpipe-v") and isinstance(num_micro, int) and num_micro < 2 * model.num_stages:
            raise DeepSpeedConfigError(
                f"gradient_accumulation_steps = {num_micro}, but DualPipeV on {model.num_stages} ranks needs at least "
                f"{2 * model.num_stages} micro-batches.\n  Raise it, or set pipeline.schedule to zb-v."
            )
        super().__init__(args=args, model=model, mpu=mpu, **kwargs)


def _post_of(mesh: Mesh, device: torch.device) -> Post:
    """The ways to the other ranks of the pipeline, which all engines of a mesh share. Collective over the job."""
    there, back = mesh.group("pipeline", "activations"), mesh.group("pipeline", "gradients")
    groups = {(True, True): there, (True, False): there, (False, False): back, (False, True): back}
    control = None
    if device.type != "cpu":
        control = mesh.group("pipeline", "control", "gloo")
        groups[True, False] = mesh.group("pipeline", "activations_back")
        groups[False, True] = mesh.group("pipeline", "gradients_back")
    ranks, own = mesh.ranks("pipeline"), mesh.rank("pipeline")
    return mesh.shared("pipeline.post", lambda: Post(ranks, own, groups, device, control))


def _tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.nbytes
