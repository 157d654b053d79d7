"""The engine: what `deepspeed.initialize` returns and a training loop drives.

Stands on top of every layer and owns them: mesh, buckets, reducer, gatherer, optimizer, schedule, counters. It decides
when; the layers below do. Attached listeners (boundary, watch) hold no reference to the engine, so an engine that the
user drops is freed with its hooks.

    loss = engine(batch)         unshard, compute, reshard                              zero.gather, zero.hooks
    engine.backward(loss)        scale; gradients are taken over, reduced on the way    zero.reduce
    engine.step()                at the boundary: norm, skip or clip, update, publish   zero.optimizer
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.assembly import assemble
from deepspeed.config import Config, check_available, load_config, read_config
from deepspeed.engine.accumulation import Accumulation
from deepspeed.engine.agreement import describe_model, flatten, require_equal
from deepspeed.engine.at_rest import AtRest
from deepspeed.engine.checkpoints import CheckpointMethods, Checkpoints
from deepspeed.engine.data import DeepSpeedDataLoader
from deepspeed.engine.facts import Progress, RunFacts, StepFacts
from deepspeed.engine.observe import Watched, announce, make_observers, run_directory
from deepspeed.engine.observer import computing_dtype
from deepspeed.engine.out_of_memory import MemoryAdvice
from deepspeed.engine.queries import ConfigQueries
from deepspeed.engine.recompute import Recomputation
from deepspeed.engine.scheduler_call import SchedulerCall
from deepspeed.engine.script_attributes import LATER, ScriptAttributes
from deepspeed.mesh import Mesh
from deepspeed.monitor.master import MonitorMaster
from deepspeed.monitor.trace import trace
from deepspeed.precision import StaticLossScale, Widening, needs_wide_matmul
from deepspeed.tiers import Tier
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, NotAvailableError, TrainingStateError
from deepspeed.utils.logging import logger, set_log_level_from_string, warn_once
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer
from deepspeed.zero.access import trainers
from deepspeed.zero.away import PutAway
from deepspeed.zero.build import Built, build
from deepspeed.zero.gather import Gatherer
from deepspeed.zero.hooks import BackwardWatch, ModuleHooks
from deepspeed.zero.join import Joining
from deepspeed.zero.modes import plain_modes
from deepspeed.zero.offload import make_placing
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import full_numel, slot_of
from deepspeed.zero.parameter_offload import EXTERNALS, ParameterOffload
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.takeover import Takeover, rename

_engine_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()


UNCOMPILED = "_uncompiled_forward"
"""Where a unit that `compile` changed keeps the `forward` it had of its own, if any."""


class LossScaleGuard:
    """Notices a plain `loss.backward()` where the loss has to be scaled first."""

    def __init__(self, scale: StaticLossScale) -> None:
        self.scale = scale
        self.is_scaled = False

    def check(self) -> None:
        """Called as a backward begins. Raises TrainingStateError for an unscaled loss."""
        if not self.is_scaled and (self.scale.is_dynamic or self.scale.scale != 1.0):
            raise TrainingStateError(
                f"loss.backward() on an unscaled loss: fp16 needs it multiplied by the loss scale ({self.scale.scale:g}).\n"
                "  Use engine.backward(loss), or engine.scale(loss).backward()."
            )

    def reset(self) -> None:
        """Called as a backward ends."""
        self.is_scaled = False


class DeepSpeedEngine(ConfigQueries, ScriptAttributes, CheckpointMethods, nn.Module):
    """A model under ZeRO, with its optimizer. Made by `deepspeed.initialize`; see there for the arguments.

    Collective to build, and in `step`; at stages 2 and 3 in `backward`, at stage 3 in forward. Attributes that the
    engine does not have are the model's.
    """

    def __init__(
        self,
        args: Any = None,
        model: nn.Module | None = None,
        optimizer: Any = None,
        model_parameters: Iterable[Any] | None = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        config: Any = None,
        config_class: Any = None,
        mesh_device: Any = None,
        dont_change_device: bool = False,
    ) -> None:
        super().__init__()
        assemble.check_model(model)
        assert model is not None
        _take_over(model)
        self._user_config = config if isinstance(config, dict) else read_config(config)
        self._config: Config = load_config(config)
        check_available(self._config)
        if self._config.log_level:
            set_log_level_from_string(self._config.log_level)
        self.mpu = mpu
        self._device = _own_device()
        with plain_modes(), contextlib.ExitStack() as undo:
            self._build(undo, model, optimizer, model_parameters, lr_scheduler)
            self._build_observers(undo)
            self.collate_fn = collate_fn
            self.training_dataloader = self.deepspeed_io(training_data) if training_data is not None else None
            self._finalizer = weakref.finalize(self, undo.pop_all().close)
        self.global_steps = 0
        self.global_samples = 0
        self.skipped_steps = 0
        self.losses: Tensor | None = None
        self._was_step_applied = False
        self._knows_order = len(self._reducer.gradients) < 2
        _engine_of[model] = weakref.ref(self)
        if self._config.disable_python_gc:
            gc.disable()
        if self._config.dump_state:
            logger.warning("%s", self._config)
        if self._observers:
            announce(self._run_facts(), self.monitor, bool(self._config.steps_per_print))

    # Building. -----------------------------------------------------------------------------------------------------

    def _build(
        self,
        undo: contextlib.ExitStack,
        model: nn.Module,
        optimizer: Any,
        model_parameters: Iterable[Any] | None,
        lr_scheduler: Any,
    ) -> None:
        """Each step leaves in `undo` what takes it back; nothing there refers to the engine."""
        self.mesh: Mesh = assemble.make_mesh(self._config, self.mpu)
        undo.callback(self.mesh.release)
        self._agree_with_other_ranks(model)
        batch = assemble.batch_sizes(self._config, self.mesh, self.mpu)
        self._micro_batch_size = batch.micro
        self.accumulation = Accumulation(batch.accumulation, self._config.managed_gradient_accumulation)
        self.module = model
        self._recomputation = Recomputation(model, self._config, self.mesh, self._device)
        undo.callback(self._recomputation.detach)
        self._build_zero(undo, model, optimizer, model_parameters)
        self._build_forward(undo)
        self._checkpoints = Checkpoints(self._config)
        undo.callback(self._checkpoints.background.join)
        self.lr_scheduler = assemble.make_scheduler(self._config, lr_scheduler, self.basic_optimizer, optimizer)
        self._schedule = SchedulerCall(self.lr_scheduler)
        self.client_lr_scheduler = lr_scheduler

    def _agree_with_other_ranks(self, model: nn.Module) -> None:
        # An engine that the script dropped may still live on some ranks, so all have to hear of a refusal.
        for refusal in self.mesh.gather_objects("job", _shared_with_another(model)):
            if refusal is not None:
                raise DeepSpeedError(refusal)
        require_equal(self.mesh, "configuration", flatten(self._user_config), "Give every rank the same configuration.")
        require_equal(
            self.mesh,
            "model",
            describe_model(model),
            "Build the same model, with the same frozen parameters, on every rank.",
        )

    def _build_zero(
        self, undo: contextlib.ExitStack, model: nn.Module, client: Any, model_parameters: Iterable[Any] | None
    ) -> None:
        config = self._config
        stage = config.zero_optimization.stage
        groups = assemble.parameter_groups(model, model_parameters)
        basic = assemble.make_optimizer(config, client, groups, model)
        assemble.check_optimizer(basic, model, stage)
        assemble.mark_leaves(model, config)
        self.policy = assemble.make_policy(config, model)
        scale = assemble.make_scale(config)
        self._scale_guard = LossScaleGuard(scale)
        self.watch = BackwardWatch()
        self.watch.on_begin.append(self._scale_guard.check)
        assemble.cast_buffers(model, config)
        placing = make_placing(config, self.policy, self._device)
        assemble.open_disks(config, self.mesh, placing, model, basic)
        built = build(model, assemble.group_indices(basic), placing, self.mesh, assemble.make_limits(config))
        self._built: Built = built
        undo.callback(built.close)
        self._gatherer: Gatherer | None = None
        self._parameter_offload: ParameterOffload | None = None
        self._hooks: ModuleHooks | None = None
        if built.sharded:
            self._hooks = self._make_hooks(model, built)
            undo.callback(_detach_hooks, self._hooks)
            self._parameter_offload = ParameterOffload(self._hooks)
            undo.callback(self._parameter_offload.close)
            self._gatherer = self._hooks.gatherer
        self._reducer = assemble.make_reducer(
            config,
            self.mesh,
            placing,
            built.masters,
            self.accumulation.should_reduce,
            self._hooks.bucket_completed if self._hooks else None,
        )
        self._reducer.set_order(assemble.order_of_backward(model, built.masters))
        undo.callback(self._reducer.close)
        self.basic_optimizer = basic
        self.zero_optimizer: ZeroOptimizer | None = None
        self._put_away: PutAway | None = None
        if basic is not None:
            self.zero_optimizer = ZeroOptimizer(
                basic,
                built.masters,
                self._reducer,
                self.policy,
                self.mesh,
                scale=scale,
                clip=config.gradient_clipping,
                skip_non_finite=config.bf16.enabled and config.bf16.check_grad_overflow,
                sub_group_numel=config.zero_optimization.sub_group_size,
                placing=placing,
                allow_untested=config.zero_allow_untested_optimizer,
                zero_stage=stage,
            )
            self._put_away = PutAway(self.zero_optimizer, built.buckets)
            self.zero_optimizer.parameter_offload = self._parameter_offload
            make_gradients = functools.partial(
                assemble.make_gradients, config, self.mesh, placing, pool=self._reducer.pool
            )
            joining = Joining(built, self.zero_optimizer, self._hooks, make_gradients)
            takeover = Takeover(model, built, self.zero_optimizer, self.mesh, joining, stage)
            self.zero_optimizer.takeover = takeover
            undo.callback(takeover.close)
            self.zero_optimizer.before_update = self._hooks.before_update if self._hooks else self.watch.end
            trainers.add(self.zero_optimizer)
            undo.callback(trainers.remove, self.zero_optimizer)
        if not self.policy.optimizer.is_sharded:
            self.watch.on_begin.append(self._reducer.hide)
            self.watch.on_end.append(functools.partial(_expose, self._reducer, self.accumulation))
        self.watch.on_end.append(self._scale_guard.reset)
        self.watch.on_end.append(self._reducer.flush)

    def _make_hooks(self, model: nn.Module, built: Built) -> ModuleHooks:
        zero = self._config.zero_optimization
        gatherer = Gatherer(
            built.sharded,
            functools.partial(_agree, self.mesh),
            prefetch_numel=zero.stage3_prefetch_bucket_size,
            max_live_numel=zero.stage3_max_live_parameters,
            max_reuse_distance=zero.stage3_max_reuse_distance,
        )
        hooks = ModuleHooks(model, built.users, gatherer, self.watch)
        for module in model.modules():
            for param in module.__dict__.get(EXTERNALS, {}).values():
                slot = slot_of(param)
                if slot and slot.bucket.is_sharded:
                    hooks.add_user(module, slot.bucket)
        return hooks

    def _build_forward(self, undo: contextlib.ExitStack) -> None:
        dtype = self.policy.parameters.dtype
        widens = self._device.type == "cpu" and needs_wide_matmul(dtype)
        self._widening = Widening(self.module.modules() if widens else ())
        undo.callback(self._widening.detach)
        autocast = self._config.torch_autocast
        self._autocast_dtype = (autocast.dtype or torch.bfloat16) if autocast.enabled else None
        self._casts_inputs = dtype if self._config.fp16.enabled and self._config.fp16.auto_cast else None

    def _build_observers(self, undo: contextlib.ExitStack) -> None:
        if self._config.comms_logger.enabled:
            comm.configure(self._config)
        self.monitor = MonitorMaster(self._config, run_directory(self._config, self.mesh))
        undo.callback(self.monitor.close)
        is_timed = self._config.wall_clock_breakdown or self._config.flops_profiler.enabled
        self.timers = SynchronizedWallClockTimer(get_accelerator().synchronize) if is_timed else NoopTimer()
        self._at_rest = AtRest(self.module, self._built, self._reducer, self.zero_optimizer)
        self._advice = MemoryAdvice(self._at_rest, self._config, self.dp_world_size)
        watched = Watched(self.module, self.watch, self.mesh, self._at_rest, self.timers)
        self._observers = make_observers(self._config, self.monitor, watched)
        for observer in self._observers:
            undo.callback(observer.close)

    # The training step. --------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's own output for its own arguments."""
        self._before_forward()
        self._recomputation.choose(inputs, kwargs)
        if self._casts_inputs is not None:
            inputs = tuple(_cast_floating(value, self._casts_inputs) for value in inputs)
        with self._phase("forward", (inputs, kwargs)), self._forward_contexts():
            output = self.module(*inputs, **kwargs)
        if self._hooks is None and torch.is_grad_enabled():
            self.watch.watch(output)
        return output

    def _before_forward(self) -> None:
        if self._finalizer.peek() is None:
            raise TrainingStateError(
                "this engine was destroyed, or its model given to a newer engine.\n"
                "  Use the newer one, or make one with deepspeed.initialize."
            )
        self.watch.end()
        self.reload_states()
        if torch.is_grad_enabled():
            self._reducer.hide()
            self._reducer.flush()

    @contextlib.contextmanager
    def _phase(self, name: str, value: Any = None) -> Iterator[None]:
        """A part of the step, as a span and for the observers."""
        with torch.profiler.record_function(f"engine.{name}"), self._advice.explained(name):
            for observer in self._observers:
                observer.begins(name, value)
            try:
                yield
            finally:
                for observer in reversed(self._observers):
                    observer.ends(name)

    @contextlib.contextmanager
    def _forward_contexts(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._autocast_dtype is not None:
                stack.enter_context(torch.autocast(self._device.type, dtype=self._autocast_dtype))
            yield

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the loss scale, for `engine.scale(loss).backward()`."""
        self._scale_guard.is_scaled = True
        return loss.float() * self.loss_scale() if self.loss_scale() != 1.0 else loss

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any) -> Tensor:
        """Backward of the loss (a scalar), divided by the micro-batches of a step unless told not to.

        Returns that divided loss. Collective at stages 2 and 3, and at the boundary.
        """
        self._check_loss(loss)
        num_micro_batches = self.accumulation.num_micro_batches
        divided = loss / num_micro_batches if scale_wrt_gas and num_micro_batches > 1 else loss
        self._reducer.hide()
        self.losses = loss.detach()
        num_begun = self.watch.num_begun
        with self._phase("backward", self.losses):
            self.scale(divided).backward(retain_graph=retain_graph, **kwargs)
            self.watch.end()
            if self.watch.num_begun == num_begun:
                self._reducer.expect_round()
                self.watch.stand_in()
        return divided

    def _check_loss(self, loss: Any) -> None:
        if self.zero_optimizer is None:
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

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch; at the boundary update the weights and the learning rate. Collective at the boundary.

        Raises TrainingStateError before any backward, and inside `no_sync`.
        """
        if self.accumulation.no_sync_depth:
            raise TrainingStateError("engine.step() inside of engine.no_sync().\n  Leave the context first.")
        if self.zero_optimizer is None:
            raise TrainingStateError("engine.step(): the engine has no optimizer, it can only evaluate.")
        takeover = self.zero_optimizer.takeover
        if not (self._reducer.saw_backward or (takeover and takeover.has_left_gradients)) and self._reducer.gradients:
            raise TrainingStateError(
                "engine.step() before backward: no gradient arrived since the last step.\n"
                "  Call engine.backward(loss) (or loss.backward()) on a loss computed from the engine's output first."
            )
        self.watch.end()
        self.reload_states()
        self.accumulation.is_stepping = True
        self._was_step_applied = False
        ends_step = self.accumulation.is_boundary
        try:
            if ends_step:
                self._step_at_boundary(lr_kwargs or {})
            else:
                self._reducer.flush()
        finally:
            self.accumulation.is_stepping = False
        self.accumulation.count(ends_step)

    def _step_at_boundary(self, lr_kwargs: dict[str, Any]) -> None:
        assert self.zero_optimizer is not None
        call = self._scheduler_call()
        call.check(lr_kwargs)
        with self._phase("step"):
            self.zero_optimizer.step()
        if self.zero_optimizer.overflow:
            self.skipped_steps += 1
        else:
            self._was_step_applied = True
            call.step(lr_kwargs, self.train_batch_size())
        self._learn_order()
        self.global_steps += 1
        self.global_samples += self._micro_batch_size * self.accumulation.num_micro_batches * self.dp_world_size
        facts = self._step_facts() if self._observers else None
        for observer in self._observers:
            assert facts is not None, "made where somebody watches"
            observer.step_ended(facts)

    def _step_facts(self) -> StepFacts:
        progress = Progress(
            global_steps=self.global_steps, global_samples=self.global_samples, skipped_steps=self.skipped_steps
        )
        return StepFacts(
            progress=progress,
            was_applied=self._was_step_applied,
            lr=tuple(self.get_lr()),
            grad_norm=self.get_global_grad_norm(),
            loss_scale=self.loss_scale(),
            micro_batch_size=self.train_micro_batch_size_per_gpu(),
        )

    def _run_facts(self) -> RunFacts:
        return RunFacts(
            model=type(self.module).__name__,
            num_parameters=self.num_parameters(),
            zero_stage=self._config.zero_optimization.stage,
            num_ranks=self.dp_world_size,
            dtype=dtype_name(computing_dtype(self._config)),
            optimizer=type(self.basic_optimizer).__name__ if self.basic_optimizer is not None else None,
            train_batch_size=self.train_batch_size(),
            micro_batch_size=self.train_micro_batch_size_per_gpu(),
            accumulation=self.gradient_accumulation_steps(),
        )

    def _scheduler_call(self) -> SchedulerCall:
        if self._schedule.scheduler is not self.lr_scheduler:  # the script has put another one there
            self._schedule = SchedulerCall(self.lr_scheduler)
        return self._schedule

    def _learn_order(self) -> None:
        """After the first step, launch reductions in the order in which the first rank's gradients arrived."""
        if not self._knows_order:
            self._knows_order = True
            self._reducer.set_order(self.mesh.gather_objects("average", self._reducer.completion_order())[0])

    def _take_over_edits(self) -> None:
        """Have what the script changed about the model in its place, before that is saved or loaded. Collective."""
        if self.zero_optimizer is not None and self.zero_optimizer.takeover is not None:
            self.zero_optimizer.takeover.settle()
        else:
            rename(self._built, self.module)

    # Accumulation. -------------------------------------------------------------------------------------------------

    @property
    def micro_steps(self) -> int:
        """Calls of `step()` so far."""
        return self.accumulation.micro_steps

    @micro_steps.setter
    def micro_steps(self, count: int) -> None:
        self.accumulation.set_micro_steps(count)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch completes a step; valid before `step()`."""
        return self.accumulation.is_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batch to come completes a step; holds until said otherwise."""
        if not self.accumulation.is_managed:
            raise TrainingStateError(
                "set_gradient_accumulation_boundary: managed_gradient_accumulation is false, every step() is a boundary."
            )
        self.accumulation.override = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep this rank's gradients to itself in backward passes inside. Where gradients rest sharded (stages 2, 3)
        they are reduced all the same, with equal results: there is no full buffer to add them up in."""
        if self.accumulation.no_sync_depth:
            raise TrainingStateError("engine.no_sync() inside of engine.no_sync().")
        if self.policy.gradients.is_sharded:
            warn_once(
                "no_sync at ZeRO stages 2 and 3 reduces every backward: gradients rest sharded. Results are the same."
            )
        self.accumulation.no_sync_depth += 1
        try:
            yield
            self._reducer.flush()
        finally:
            self.accumulation.no_sync_depth -= 1

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Reduce once, on exit, for several backward passes inside (stages 0 and 1; 2 and 3 reduce as they go)."""
        self.accumulation.no_sync_depth += 1
        try:
            yield
        finally:
            self.accumulation.no_sync_depth -= 1
        self.allreduce_gradients()

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Reduce what this rank has of the step's gradients, now. Collective."""
        self.watch.end()
        if self._reducer.saw_backward:
            self._reducer.finish()
            _expose(self._reducer, self.accumulation, True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget this step's gradients."""
        self._reducer.drop()
        for param in self.module.parameters():
            param.grad = None

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the weights."""
        return self._was_step_applied

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's averaged gradients before clipping; None before the first step."""
        if self.zero_optimizer is None or self.zero_optimizer.grad_norm is None:
            return None
        return self.zero_optimizer.grad_norm

    def get_lr(self) -> list[float]:
        """Learning rate per parameter group."""
        return [group["lr"] for group in self._groups()]

    def get_type(self) -> list[Any]:
        """`type` per parameter group, where groups carry one."""
        return [group.get("type") for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """Betas per parameter group; momentum for SGD and RMSprop."""
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.basic_optimizer.param_groups if self.basic_optimizer is not None else []

    # Batches and data. ---------------------------------------------------------------------------------------------

    def train_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self._micro_batch_size * self.gradient_accumulation_steps() * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per rank and micro-batch."""
        return self._micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per step; what `set_train_batch_size` said last, also where it holds from the next step on."""
        return self.accumulation.asked

    def get_batch_info(self) -> tuple[Callable[[], int], Callable[[], int], Callable[[], int]]:
        """The three methods above, bound."""
        return self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change samples per step by changing the number of micro-batches; a step under way ends as it began. Raises
        ValueError if that is not whole."""
        per_micro = self._micro_batch_size * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % per_micro:
            raise DeepSpeedError(
                f"set_train_batch_size({train_batch_size}): not a multiple of micro-batch {self._micro_batch_size} * "
                f"{self.dp_world_size} ranks = {per_micro}."
            )
        self.accumulation.ask_for(train_batch_size // per_micro, is_under_way=self._reducer.saw_backward)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change samples per micro-batch; the number of micro-batches stays."""
        self._micro_batch_size = micro_batch_size

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """A loader of this rank's share of a dataset, shuffled for the "train" route. Raises ValueError for other things."""
        if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
            raise DeepSpeedError(
                f"training_data is a {type(dataset).__name__}: neither a map-style nor an iterable dataset."
            )
        return DeepSpeedDataLoader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            pin_memory=pin_memory,
            data_sampler=data_sampler,
            collate_fn=collate_fn or self.collate_fn,
            num_local_io_workers=num_local_io_workers,
            data_parallel_world_size=self.mesh.size("batch"),
            data_parallel_rank=self.mesh.rank("batch"),
            dataloader_drop_last=self._config.dataloader_drop_last,
            shuffle=route == "train",
        )

    # What the engine is. -------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Any:
        """The optimizer; of a ZeRO stage 3 engine without one, the owner of the hooks on its modules. Else None."""
        return self.zero_optimizer if self.zero_optimizer is not None else self._parameter_offload

    @property
    def config(self) -> dict[str, Any]:
        """The user's own dictionary, unchanged."""
        return self._user_config

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._device

    @property
    def local_rank(self) -> int:
        """This rank's position on its node."""
        return comm.get_local_rank()

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        """Number of all processes."""
        return torch.distributed.get_world_size()

    @property
    def dp_world_size(self) -> int:
        """Number of ranks that share a batch."""
        return self.mesh.size("batch")

    @property
    def mp_world_size(self) -> int:
        """Number of model-parallel ranks."""
        return self.mesh.size("model")

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        """Set training mode. Returns None, as callers expect."""
        nn.Module.train(self, mode)

    def eval(self) -> None:  # type: ignore[override]
        """Set evaluation mode. Returns None, as callers expect."""
        nn.Module.train(self, False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
            try:
                return getattr(module, name)
            except AttributeError:
                later = f": it comes with {LATER[name]}, which is not available yet" if name in LATER else ""
                raise AttributeError(
                    f"neither {type(self).__name__} nor {type(module).__name__} has {name!r}{later}"
                ) from None

    def memory_by_kind(self) -> dict[str, int]:
        """Bytes at rest on this rank, on whatever tier: parameters, gradients, optimizer (masters and states)."""
        return self._at_rest.by_kind()

    def trace(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Trace what runs inside of the context into a file for Chrome or Perfetto (.json or .json.gz), on this rank."""
        return trace(path)

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model in place; a second call does nothing. At stage 3 each unit is compiled for itself, because
        parameters come and go between units."""
        if self.is_compiled:
            return
        if compiled_autograd_enabled or schedule is not None:
            raise NotAvailableError(
                "engine.compile(schedule=..., compiled_autograd_enabled=True) is not available yet."
            )
        kwargs = {"backend": backend, **(compile_kwargs or {})}
        self._widening.detach()
        if self._hooks is None:
            self.module.compile(**kwargs)
        else:
            for unit, buckets in self._hooks.users.items():
                if buckets and unit is not self.module:
                    unit.__dict__[UNCOMPILED] = unit.__dict__.get("forward")
                    unit.forward = torch.compile(unit.forward, **kwargs)
        self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self.__dict__.get("_is_compiled", False)

    def destroy(self) -> None:
        """Take hooks and buffers away; the model can be given to another engine. Also done when the engine is dropped."""
        self._finalizer()
        _engine_of.pop(self.module, None)

    def collect_python_gc(self) -> int:
        """Collect Python's cyclic garbage now, for runs with `disable_python_gc`; the number of objects found."""
        return gc.collect()

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Put states (a set of OffloadStateTypeEnum; default all) away into main memory between steps, stages 1 to 3.

        The next forward or step brings them back, or `reload_states`. Raises DeepSpeedConfigError (a ValueError and an
        AssertionError) for another device, stage 0, and where parameters are offloaded already.
        """
        stage = self._config.zero_optimization.stage
        if self._put_away is None or stage == 0 or self.policy.parameters.tier is not Tier.DEVICE:
            what = "stage 0" if stage == 0 else "offload_param" if self._put_away else "an engine without optimizer"
            raise DeepSpeedConfigError(
                f"offload_states does not go with {what}.\n  Use it at ZeRO stages 1 to 3 without offload_param."
            )
        self._put_away.put(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` put away."""
        if self._put_away is not None and not self._put_away.is_empty:
            self._put_away.bring_back(non_blocking)

    def empty_partition_cache(self) -> None:
        """Stage 3: reshard everything that is unsharded and not in use."""
        if self._gatherer is not None:
            self._gatherer.reshard_all()

    def __deepcopy__(self, memo: Any) -> Any:
        raise DeepSpeedError(
            "an engine cannot be copied: it owns process groups.\n  Copy the model: with "
            "deepspeed.zero.GatheredParameters(engine.module.parameters()): copy.deepcopy(engine.module)."
        )

    def __reduce__(self) -> Any:
        raise DeepSpeedError(
            "an engine cannot be pickled: it owns process groups.\n  Save its weights: engine.save_16bit_model(...)."
        )

    def num_parameters(self) -> int:
        """Elements of all parameters, sharded or not."""
        return sum(full_numel(param) for param in self.module.parameters())


def _own_device() -> torch.device:
    """The device of this rank: the one of its local rank where several ranks share a node."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(comm.get_local_rank())
    return torch.device(accelerator.current_device_name())


def _cast_floating(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _agree(mesh: Mesh, wish: int, digest: int) -> list[tuple[int, int]]:
    return mesh.agree("shard", wish, digest)  # type: ignore[return-value]


def _expose(reducer: Reducer, accumulation: Accumulation, always: bool = False) -> None:
    """Stage 0: show averaged gradients as `param.grad` after the boundary's backward, as plain PyTorch does."""
    if (always or accumulation.should_reduce()) and reducer.saw_backward:
        reducer.finish()
        reducer.expose()


def _take_over(model: nn.Module) -> None:
    """End the engine that a model belongs to, whose hooks would run beside the new one's: Lightning makes an engine to
    train and another to test, TRL one to score and another to train, and neither ends the first."""
    if isinstance(model, DeepSpeedEngine):
        raise DeepSpeedError("the model is already a DeepSpeedEngine.\n  Pass engine.module, after engine.destroy().")
    previous = _engine_of.get(model, lambda: None)()
    if previous is not None:
        logger.info("the model of a live DeepSpeedEngine is given to a new one; the earlier engine is destroyed.")
        previous.destroy()


def _shared_with_another(model: nn.Module) -> str | None:
    """Why a model cannot have an engine: another live one manages some of its parameters. One whose parameters are all in
    this model is ended instead, as by a new engine on the same model: the script wrapped it."""
    params = {param: name for name, param in model.named_parameters()}
    for reference in list(_engine_of.values()):
        other = reference()
        if other is None or other._finalizer.peek() is None or other.module is model:
            continue
        managed = [param for bucket in other._built.buckets for param in bucket.params]
        shared = [param for param in managed if param in params]
        if shared and len(shared) == len(managed):
            logger.info("the model of a live DeepSpeedEngine is part of a new one's; the earlier engine is destroyed.")
            other.destroy()
        elif shared:
            return (
                f"{params[shared[0]]}{f' and {len(shared) - 1} more' if shared[1:] else ''} of this {type(model).__name__} "
                f"belong to another live engine (of a {type(other.module).__name__}): each would move them into buckets of its "
                "own.\n  Make one engine of one module that holds both models, with a parameter group for each; or end the other "
                "first with engine.destroy()."
            )
    return None


def _detach_hooks(hooks: ModuleHooks) -> None:
    """Take the hooks away, and what `compile` put in place of the units' forward."""
    hooks.detach()
    for module in hooks.users:
        if UNCOMPILED in module.__dict__:
            del module.__dict__["forward"]
            own = module.__dict__.pop(UNCOMPILED)
            if own is not None:
                module.forward = own
