"""The engine: what `deepspeed.initialize` returns and a training loop drives.

A facade: built by `engine.build`, stepped by `engine.step`, where `forward`, `backward` and `step` are; here are the other
names by which scripts and integrations ask. What it stands on holds no reference to it, so an engine that the user drops is
freed with its hooks.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed import comm
from deepspeed.assembly import assemble
from deepspeed.config import Config, check_available, load_config, read_config
from deepspeed.engine.backward import expose
from deepspeed.engine.build import Given, Parts, Watching, build_parts, build_watching, own_device
from deepspeed.engine.checkpoints import CheckpointMethods
from deepspeed.engine.compile import compile_model
from deepspeed.engine.data import DeepSpeedDataLoader
from deepspeed.engine.facts import Progress, RunFacts, StepFacts
from deepspeed.engine.holders import give_back, innermost
from deepspeed.engine.observe import announce, divided
from deepspeed.engine.observer import computing_dtype
from deepspeed.engine.owners import forget_owner, note_owner, take_over
from deepspeed.engine.queries import ConfigQueries
from deepspeed.engine.script_attributes import LATER, ScriptAttributes
from deepspeed.engine.step import Conductor, TrainingStep
from deepspeed.engine.tensor import stated_mpu
from deepspeed.mesh import groups, marks
from deepspeed.monitor.trace import trace
from deepspeed.parallel.tensor.apply import PARSED
from deepspeed.tiers import Tier
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, NotAvailableError, TrainingStateError
from deepspeed.utils.logging import logger, set_log_level_from_string, warn_once
from deepspeed.zero.modes import plain_modes
from deepspeed.zero.param import full_numel
from deepspeed.zero.takeover import rename


class DeepSpeedEngine(TrainingStep, ConfigQueries, ScriptAttributes, CheckpointMethods, nn.Module):
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
        model = _checked(model)
        take_over(model)
        self.mesh_device = mesh_device
        self._user_config = config if isinstance(config, dict) else read_config(config)
        self._config: Config = load_config(config)
        check_available(self._config)
        if self._config.log_level:
            set_log_level_from_string(self._config.log_level)
        self.mpu = mpu = stated_mpu(self._config, mpu)
        self.client_lr_scheduler = lr_scheduler
        self._device = own_device()
        given = Given(
            self._config,
            self._user_config,
            model,
            innermost(optimizer),
            assemble.as_lists(model_parameters),
            lr_scheduler,
            mpu,
            self._device,
            mesh_device,
        )
        with plain_modes(), contextlib.ExitStack() as undo:
            parts = build_parts(given, undo)
            self._take(model, parts, build_watching(given, parts, undo, DeepSpeedEngine))
            if parts.mesh.size("tensor") > 1 and PARSED in model.__dict__:
                self.mpu = groups
            self.collate_fn = collate_fn
            self.training_dataloader = self.deepspeed_io(training_data) if training_data is not None else None
            undo.callback(self._ended.append, True)
            self._finalizer = weakref.finalize(self, undo.pop_all().close)
        self.global_steps = 0
        self.global_samples = 0
        self.skipped_steps = 0
        self.losses: Tensor | None = None
        self._was_step_applied = False
        note_owner(model, self)
        if self._config.disable_python_gc:
            gc.disable()
        if self._config.dump_state:
            logger.warning("%s", self._config)
        if self._observers:
            announce(self._run_facts(), self.monitor, bool(self._config.steps_per_print))

    def _take(self, model: nn.Module, parts: Parts, watching: Watching) -> None:
        """Have what was built under the names by which it is asked for."""
        self.module = model
        self._ended: list[bool] = []
        """Filled when the engine ends: a finalizer's own state is none that torch's compiler can watch."""
        self._zero = zero = parts.zero
        self.mesh, self.accumulation, self._checkpoints = parts.mesh, parts.accumulation, parts.checkpoints
        self._micro_batch_size = parts.micro_batch_size
        self.policy, self.watch, self._built, self._reducer = zero.policy, zero.watch, zero.built, zero.reducer
        self._gatherer = zero.hooks.gatherer if zero.hooks is not None else None
        self.basic_optimizer, self.zero_optimizer = zero.basic_optimizer, zero.optimizer
        self._schedules = parts.schedules
        self.monitor, self.timers = watching.monitor, watching.timers
        self._at_rest, self._observers = watching.at_rest, watching.observers
        self._recomputation, self._casts, self._sequence_loss = parts.recomputation, parts.casts, parts.sequence_loss
        self._conductor = Conductor(parts, watching)

    @property
    def lr_scheduler(self) -> Any:
        """The learning-rate scheduler, which a script may replace; None for none."""
        return self._schedules.learning_rate.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self._schedules.learning_rate.scheduler = scheduler

    def _step_facts(self, progress: Progress) -> StepFacts:
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
            divided=divided(self.mesh),
            dtype=dtype_name(computing_dtype(self._config)),
            optimizer=type(self.basic_optimizer).__name__ if self.basic_optimizer is not None else None,
            train_batch_size=self.train_batch_size(),
            micro_batch_size=self.train_micro_batch_size_per_gpu(),
            accumulation=self.gradient_accumulation_steps(),
        )

    def _take_over_edits(self) -> None:
        """Have what the script changed about the model in its place, before that is saved or loaded. Collective."""
        if self.zero_optimizer is not None and self.zero_optimizer.takeover is not None:
            self.zero_optimizer.takeover.put_in_order()
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
            expose(self._reducer, self.accumulation, True)

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
        return self.zero_optimizer if self.zero_optimizer is not None else self._zero.parameter_offload

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

    def autotp_size(self) -> int:
        """Over how many ranks the model's layers were cut; 0 where they are whole."""
        return self.mesh.size("tensor") if self.module.__dict__.get(PARSED) else 0

    def tensor_parallel_config(self) -> Any:
        """The section `tensor_parallel`."""
        return self._config.tensor_parallel

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
                later = f": it comes with {LATER[name]}" if name in LATER else ""
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
        if self._config.compile.splits_sequences:
            warn_once(
                'compile.passes = ["autosp"]: sequences are split without a compiler, and the model is not compiled.'
            )
            return
        self._casts.widening.detach()
        compile_model(self.module, self._zero.hooks, **{"backend": backend, **(compile_kwargs or {})})
        self._is_compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self.__dict__.get("_is_compiled", False)

    def destroy(self) -> None:
        """Take hooks and buffers away; the model can be given to another engine. Also done when the engine is dropped."""
        self._finalizer()
        forget_owner(self.module)
        give_back(self)

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
        stage, put_away = self._config.zero_optimization.stage, self._zero.put_away
        if put_away is None or stage == 0 or self.policy.parameters.tier is not Tier.DEVICE:
            what = "stage 0" if stage == 0 else "offload_param" if put_away else "an engine without optimizer"
            raise DeepSpeedConfigError(
                f"offload_states does not go with {what}.\n  Use it at ZeRO stages 1 to 3 without offload_param."
            )
        put_away.put(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` put away."""
        self._conductor.reload_states(non_blocking)

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
        """Elements of all parameters, sharded or not, with the experts of other ranks."""
        num_ranks = self.mesh.size("experts")
        params = list(self.module.parameters())
        return sum(full_numel(param) * (num_ranks if marks.of(param).is_expert else 1) for param in params)


def _checked(model: nn.Module | None) -> nn.Module:
    assemble.check_model(model)
    assert model is not None, "check_model refuses it"
    if isinstance(model, DeepSpeedEngine):
        raise DeepSpeedError("the model is already a DeepSpeedEngine.\n  Pass engine.module, after engine.destroy().")
    return model
