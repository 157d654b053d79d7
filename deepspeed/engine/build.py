"""Builds what stands under an engine, from the configuration and what the user handed in, in the order of dependence.

    mesh        -> agreement of all ranks -> batch sizes, accumulation, recomputed blocks
    ZeRO        policy -> optimizer -> buckets -> hooks -> reducer -> ZeroOptimizer -> listeners around backward
    the rest    casts in forward, checkpoints, learning-rate schedule; then, over these, what watches (`engine.observe`)

Called once by the engine's constructor, under its roof: imports everything of the engine's folder that is built, and
nothing that is built imports it but for the types of what it made.

Invariant: each step leaves in `undo` what takes it back, and nothing there refers to the engine, so that an engine which
its user drops is freed, and takes hooks and buffers along.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.assembly import assemble
from deepspeed.assembly.exchanges import make_gather_exchanges
from deepspeed.assembly.sequence import make_sequence_loss
from deepspeed.comm.choose import SHARED_MEMORY, Sharing, sharing_of
from deepspeed.config import Config
from deepspeed.engine import earlier_states, experts, tensor
from deepspeed.engine.accumulation import Accumulation
from deepspeed.engine.agreement import describe_model, flatten, lazy_in, require_equal, require_same_division
from deepspeed.engine.at_rest import AtRest
from deepspeed.engine.backward import LossScaleGuard, expose
from deepspeed.engine.checkpoints import Checkpoints
from deepspeed.engine.compile import detach_hooks
from deepspeed.engine.forward import ForwardCasts
from deepspeed.engine.observe import Watched, make_observers, run_directory
from deepspeed.engine.observer import Observer
from deepspeed.engine.out_of_memory import MemoryAdvice
from deepspeed.engine.owners import shared_with_another
from deepspeed.engine.recompute import Recomputation
from deepspeed.engine.schedules import LearningRate, Schedules
from deepspeed.mesh import Mesh
from deepspeed.monitor.master import MonitorMaster
from deepspeed.parallel.sequence.loss import SequenceLoss
from deepspeed.precision import StaticLossScale
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer
from deepspeed.zero import quantized_weights
from deepspeed.zero.access import trainers
from deepspeed.zero.aliases import aliases_of
from deepspeed.zero.away import PutAway
from deepspeed.zero.build import Built, build
from deepspeed.zero.gather import Gatherer
from deepspeed.zero.graphed import GraphedUpdate, why_not
from deepspeed.zero.hook_switch import EXTERNALS, ParameterOffload
from deepspeed.zero.hooks import BackwardWatch, ModuleHooks
from deepspeed.zero.join import Joining
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.overlaps import overlap_of
from deepspeed.zero.param import slot_of
from deepspeed.zero.placing import Placing
from deepspeed.zero.policy import ZeroPolicy
from deepspeed.zero.reduce import Reducer
from deepspeed.zero.takeover import Takeover
from deepspeed.zero.tiers_from_config import make_placing

SAME_CONFIGURATION = "Give every rank the same configuration."


@dataclass(frozen=True)
class Given:
    """What `deepspeed.initialize` was given, and the engine's device."""

    config: Config
    user_config: dict[str, Any]
    model: nn.Module
    optimizer: Any
    model_parameters: list[Any] | None
    lr_scheduler: Any
    mpu: Any
    device: torch.device
    mesh_param: Any = None
    """(data, sequence) parallel size."""


@dataclass(frozen=True, kw_only=True)
class Zero:
    """ZeRO over one model."""

    policy: ZeroPolicy
    scale_guard: LossScaleGuard
    watch: BackwardWatch
    built: Built
    hooks: ModuleHooks | None
    """Stage 3 alone."""
    parameter_offload: ParameterOffload | None
    """Stage 3 alone."""
    reducer: Reducer
    basic_optimizer: torch.optim.Optimizer | None
    """The user's or the configured one; None in an engine that can only evaluate."""
    optimizer: ZeroOptimizer | None
    put_away: PutAway | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that an engine stands on, but for what watches."""

    mesh: Mesh
    micro_batch_size: int
    accumulation: Accumulation
    recomputation: Recomputation
    zero: Zero
    casts: ForwardCasts
    checkpoints: Checkpoints
    schedules: Schedules
    sequence_loss: SequenceLoss | None
    """Where ranks share sequences."""


@dataclass(frozen=True)
class Watching:
    """What watches an engine."""

    monitor: MonitorMaster
    timers: SynchronizedWallClockTimer | NoopTimer
    at_rest: AtRest
    advice: MemoryAdvice
    observers: list[Observer]


def build_parts(given: Given, undo: contextlib.ExitStack) -> Parts:
    """Everything, in order. Collective. Raises on every rank where the ranks differ in configuration or model."""
    config, model = given.config, given.model
    tp = tensor.tensor_size(config, given.mpu)
    require_same_division(assemble.division(config, tp), SAME_CONFIGURATION)
    mesh = assemble.make_mesh(config, given.mpu, given.mesh_param, tp=tp, ep=experts.agreed_ep_size(model, config))
    undo.callback(mesh.release)
    gone = experts.spread(model, mesh, config)
    _agree_with_other_ranks(given, mesh)
    check = tensor.cut_model(model, mesh, config, tp, given.optimizer)
    if check is not None:
        undo.callback(check.remove)
    batch = assemble.batch_sizes(config, mesh, given.mpu)
    accumulation = Accumulation(batch.accumulation, config.managed_gradient_accumulation)
    recomputation = Recomputation(model, config, mesh, given.device)
    undo.callback(recomputation.detach)
    with mesh.opening(undo):
        zero = _build_zero(given, mesh, accumulation, gone, undo)
    sequence_loss = make_sequence_loss(config, mesh, model)
    if sequence_loss is not None:
        zero.scale_guard.on_plain.append(sequence_loss.check_plain)
        zero.scale_guard.attach(zero.watch)
    casts = ForwardCasts(model, config, zero.policy, given.device)
    undo.callback(casts.widening.detach)
    checkpoints = Checkpoints(config)
    undo.callback(checkpoints.background.join)
    return Parts(
        mesh=mesh,
        micro_batch_size=batch.micro,
        accumulation=accumulation,
        recomputation=recomputation,
        zero=zero,
        casts=casts,
        checkpoints=checkpoints,
        schedules=_make_schedules(given, zero),
        sequence_loss=sequence_loss,
    )


def _make_schedules(given: Given, zero: Zero) -> Schedules:
    scheduler = assemble.make_scheduler(given.config, given.lr_scheduler, zero.basic_optimizer, given.optimizer)
    return Schedules(LearningRate(scheduler))


def build_watching(given: Given, parts: Parts, undo: contextlib.ExitStack, make_engine: Callable[..., Any]) -> Watching:
    """Monitors, timers and observers that the configuration asks for; `make_engine`: see `Watched`. Collective."""
    config, zero = given.config, parts.zero
    if config.comms_logger.enabled:
        comm.configure(config)
    monitor = MonitorMaster(config, run_directory(config, parts.mesh))
    undo.callback(monitor.close)
    is_timed = config.wall_clock_breakdown or config.flops_profiler.enabled
    timers = SynchronizedWallClockTimer(get_accelerator().synchronize) if is_timed else NoopTimer()
    at_rest = AtRest(given.model, zero.built, zero.reducer, zero.optimizer)
    advice = MemoryAdvice(at_rest, config, parts.mesh.size("batch"))
    observers = make_observers(
        config,
        monitor,
        Watched(
            given.model,
            zero.watch,
            parts.mesh,
            at_rest,
            timers,
            (parts.micro_batch_size, parts.accumulation.num_micro_batches),
            given.user_config,
            make_engine,
        ),
    )
    for observer in observers:
        undo.callback(observer.close)
    return Watching(monitor, timers, at_rest, advice, observers)


def own_device() -> torch.device:
    """The device of this rank: the one of its local rank where several ranks share a node."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(comm.get_local_rank())
    return torch.device(accelerator.current_device_name())


def _agree_with_other_ranks(given: Given, mesh: Mesh) -> None:
    # An engine that the script dropped may still live on some ranks, so all have to hear of a refusal.
    found = lazy_in(given.model) or shared_with_another(given.model) or overlap_of(given.model)
    for refusal in mesh.gather_objects("job", found):
        if refusal is not None:
            raise DeepSpeedError(refusal)
    sharing = sharing_of(os.environ)
    wishes = [] if sharing is Sharing.IF_FASTER else [f"the variable {SHARED_MEMORY} = {sharing.value}"]
    if mesh.size("near") > 1:
        wishes.append(f"nodes of {mesh.size('near')} ranks")
    lines = [*flatten(given.user_config), *wishes]
    require_equal(mesh, "configuration", lines, SAME_CONFIGURATION)
    cure = "Build the same model, with the same frozen parameters, on every rank."
    require_equal(mesh, "model", describe_model(given.model), cure)


# ZeRO. ---------------------------------------------------------------------------------------------------------------


def _build_zero(
    given: Given, mesh: Mesh, accumulation: Accumulation, gone: experts.Gone, undo: contextlib.ExitStack
) -> Zero:
    config, model = given.config, given.model
    policy = assemble.make_policy(config, model)
    _quantize(given, policy)
    basic = _basic_optimizer(given, gone)
    policy = assemble.with_whole_states(policy, basic)
    scale_guard = LossScaleGuard(assemble.make_scale(config), model.parameters)
    watch = BackwardWatch()
    if config.fp16.enabled:
        scale_guard.attach(watch)
    aliases = aliases_of(model)  # before a cast takes them apart
    assemble.cast_buffers(model, config)
    placing = make_placing(config, policy, given.device)
    assemble.open_disks(config, mesh, placing, model, basic)
    states = earlier_states.take(basic, model)
    limits, gathers = assemble.make_limits(config), make_gather_exchanges(config)
    built = build(model, assemble.group_indices(basic), placing, mesh, limits, gathers, aliases)
    undo.callback(built.close)
    hooks = _make_hooks(given, built, mesh, watch) if built.sharded else None
    if hooks is not None:
        undo.callback(detach_hooks, hooks)
    parameter_offload = ParameterOffload(hooks) if hooks is not None else None
    if parameter_offload is not None:
        undo.callback(parameter_offload.close)
    completed = hooks.bucket_completed if hooks is not None else None
    reducer = assemble.make_reducer(config, mesh, placing, built.masters, accumulation.should_reduce, completed)
    reducer.rounds.set_order(assemble.order_of_backward(model, built.masters))
    undo.callback(reducer.close)
    optimizer = None
    if basic is not None:
        optimizer = _wrap_optimizer(config, basic, built, reducer, policy, mesh, scale_guard.scale, placing)
        earlier_states.give(states, optimizer, mesh)
        optimizer.parameter_offload = parameter_offload
        optimizer.before_scaled = scale_guard.note_scaled
        optimizer.before_update = hooks.before_update if hooks is not None else watch.end
        optimizer.takeover = _take_over_edits(given, mesh, built, reducer, hooks, placing, optimizer, undo)
        trainers.add(optimizer)
        undo.callback(optimizer.runs.give_back)
        undo.callback(trainers.remove, optimizer)
    if not policy.optimizer.is_sharded or mesh.size("average") == 1:
        watch.on_begin.append(reducer.hide)
        watch.on_end.append(functools.partial(expose, reducer, accumulation))
    watch.on_end.append(reducer.flush)
    if policy.optimizer.is_sharded and (mesh.size("average") > 1 or built.sharded):
        watch.on_end.append(reducer.veil)
    return Zero(
        policy=policy,
        scale_guard=scale_guard,
        watch=watch,
        built=built,
        hooks=hooks,
        parameter_offload=parameter_offload,
        reducer=reducer,
        basic_optimizer=basic,
        optimizer=optimizer,
        put_away=PutAway(optimizer, built.buckets) if optimizer is not None else None,
    )


def _quantize(given: Given, policy: ZeroPolicy) -> None:
    """What `weight_quantization` says; and all quantized weights become parameters where parameters are sharded."""
    if given.config.weight_quantization.enabled:
        held = given.optimizer.param_groups if isinstance(given.optimizer, torch.optim.Optimizer) else []
        if given.model_parameters is not None or given.config.optimizer is not None:
            held = [*held, *assemble.parameter_groups(given.model, given.model_parameters)]
        trained = [param for group in held for param in group["params"]]
        quantized_weights.quantize(given.model, given.config, given.user_config, trained)
    if policy.parameters.is_sharded and quantized_weights.pack(given.model, policy.parameters.dtype):
        quantized_weights.check_moves_bits(given.config)


def _basic_optimizer(given: Given, gone: experts.Gone) -> torch.optim.Optimizer | None:
    groups = assemble.parameter_groups(given.model, given.model_parameters)
    is_clients = isinstance(given.optimizer, torch.optim.Optimizer)
    experts.without(gone, given.optimizer.param_groups if is_clients else groups)
    if not is_clients:
        groups = experts.parameter_groups(groups)
    basic = assemble.make_optimizer(given.config, given.optimizer, groups, given.model)
    assemble.check_optimizer(basic, given.model, given.config.zero_optimization.stage)
    assemble.mark_leaves(given.model, given.config)
    return basic


def _make_hooks(given: Given, built: Built, mesh: Mesh, watch: BackwardWatch) -> ModuleHooks:
    zero = given.config.zero_optimization
    gatherer = Gatherer(
        built.sharded,
        mesh.agreement("shard").start,
        prefetch_numel=zero.stage3_prefetch_bucket_size,
        max_live_numel=zero.stage3_max_live_parameters,
        max_reuse_distance=zero.stage3_max_reuse_distance,
    )
    hooks = ModuleHooks(given.model, built.users, gatherer, watch)
    for module in given.model.modules():
        for param in module.__dict__.get(EXTERNALS, {}).values():
            slot = slot_of(param)
            if slot and slot.bucket.is_sharded:
                hooks.add_user(module, slot.bucket)
    return hooks


def _wrap_optimizer(
    config: Config,
    basic: torch.optim.Optimizer,
    built: Built,
    reducer: Reducer,
    policy: ZeroPolicy,
    mesh: Mesh,
    scale: StaticLossScale,
    placing: Placing,
) -> ZeroOptimizer:
    optimizer = ZeroOptimizer(
        basic,
        built.masters,
        reducer,
        policy,
        mesh,
        scale=scale,
        clip=config.gradient_clipping,
        # What is not finite makes a whole group of a quantized message so.
        skip_non_finite=config.fp16.enabled  # with a constant loss scale too
        or (config.bf16.enabled and config.bf16.check_grad_overflow)
        or config.zero_optimization.zero_quantized_gradients
        or config.zero_optimization.zero_quantized_weights
        or config.zero_optimization.zero_quantized_nontrainable_weights,
        sub_group_numel=config.zero_optimization.sub_group_size,
        placing=placing,
        allow_untested=config.zero_allow_untested_optimizer,
        zero_stage=config.zero_optimization.stage,
    )
    if config.graph_harvesting:
        accelerator = get_accelerator()
        reason = why_not(optimizer.runs, accelerator)
        if reason is None:
            optimizer.graphed = GraphedUpdate(optimizer.runs, accelerator)
        else:
            warn_once(f"graph_harvesting has no effect: {reason}.")
    return optimizer


def _take_over_edits(
    given: Given,
    mesh: Mesh,
    built: Built,
    reducer: Reducer,
    hooks: ModuleHooks | None,
    placing: Placing,
    optimizer: ZeroOptimizer,
    undo: contextlib.ExitStack,
) -> Takeover:
    """What takes over the edits that a script makes to the model between steps."""
    config = given.config
    make_gradients = functools.partial(assemble.make_gradients, config, mesh, placing, pool=reducer.pool)
    joining = Joining(built, optimizer, hooks, make_gradients)
    takeover = Takeover(given.model, built, optimizer, mesh, joining, config.zero_optimization.stage)
    undo.callback(takeover.close)
    return takeover
