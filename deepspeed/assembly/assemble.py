"""The steps by which an engine is built from a configuration: each a function, called once, in the order of the file.

Called by `engine.engine`; knows the configuration, and turns it into the smallest thing each lower layer needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepspeed.assembly.exchanges import gradient_exchange, near_size
from deepspeed.assembly.sequence import check_sequence_size, sequence_size
from deepspeed.comm.choose import waits_on_host
from deepspeed.comm.exchange import Exchange
from deepspeed.config import BatchSizes, Config
from deepspeed.mesh import Mesh, alike_everywhere, data_parallel_mesh, with_experts
from deepspeed.mesh.mesh import world_size
from deepspeed.optim.build import build_optimizer
from deepspeed.optim.muon import split_for_muon
from deepspeed.optim.schedules import build_scheduler
from deepspeed.optim.traits import AveragesItself, StepsFused
from deepspeed.parallel.sequence import parallel_state
from deepspeed.precision import DynamicLossScale, StaticLossScale
from deepspeed.tiers import Rest, Tier
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.logging import warn_once
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.cut import LEAF_MARK
from deepspeed.zero.gradients import FlatPool, Gradients, SlicedGradients
from deepspeed.zero.master import Master, gradient_rest
from deepspeed.zero.param import full_numel, real_dtype
from deepspeed.zero.placing import Placing
from deepspeed.zero.plan import MAX_BUCKET_NUMEL, Limits
from deepspeed.zero.policy import ZeroPolicy, policy_of_stage
from deepspeed.zero.reduce import MAX_IN_FLIGHT, MAX_NBYTES_IN_FLIGHT, UNLIMITED, Limit, Reducer
from deepspeed.zero.reduction import Reduction, When
from deepspeed.zero.tiered_gradients import TieredGradients
from deepspeed.zero.tiers_from_config import bytes_on_disk, open_on_all_ranks, optimizer_tier, param_tier
from deepspeed.zero.whole_gradients import WholeGradients

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule")


def check_model(model: Any) -> None:
    """Refuse what cannot be trained: nothing, something that is no module, a model that is wrapped already."""
    if model is None:
        raise DeepSpeedError("deepspeed.initialize requires a model: got model=None.\n  Pass an nn.Module.")
    if not isinstance(model, nn.Module):
        raise DeepSpeedError(f"deepspeed.initialize(model=...) is a {type(model).__name__}, not an nn.Module.")
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            raise DeepSpeedError(
                f"the model is already wrapped in {kind.__name__}, which reduces gradients a second time.\n"
                "  Pass the bare module (model.module)."
            )


def division(config: Config, tp: int) -> list[str]:
    """What of a rank's configuration says how ranks are divided, as lines "key = value" of what is given; `tp` ranks cut layers."""
    zero = config.zero_optimization
    given = {
        "zero_optimization.stage": zero.stage,
        "zero_optimization.zero_hpz_partition_size": zero.zero_hpz_partition_size,
        "zero_optimization.zero_quantized_weights": zero.zero_quantized_weights,
        "zero_optimization.zero_quantized_gradients": zero.zero_quantized_gradients,
        "zero_optimization.mics_shard_size": zero.mics_shard_size,
        "sequence_parallel_size": config.sequence_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "tensor_parallel.autotp_size": tp,
    }
    return [f"{key} = {value}" for key, value in given.items()]


def make_mesh(config: Config, mpu: Any, mesh_param: Any = None, *, ep: int = 1, tp: int = 1) -> Mesh:
    """The mesh of all ranks, divided as `mpu` says, in shard groups of `mics_shard_size`, hpZ groups in those; experts are
    spread over `ep` ranks, layers cut over `tp` consecutive ones.

    Collective over the job.
    """
    zero = config.zero_optimization
    near = near_size(config, world_size(), tp, has_mpu=mpu is not None)
    shard_size = zero.mics_shard_size if zero.mics_shard_size > 0 else None
    sp = sequence_size(config, mesh_param, world_size() // tp, has_mpu=mpu is not None)
    if tp > 1 and mpu is parallel_state and parallel_state.is_initialized():
        parallel_state.divide_layers(tp)
    mesh = data_parallel_mesh(mpu, shard_size=shard_size, near_size=near, sp=sp, tp=tp)
    try:
        mesh = with_experts(mesh, ep, data_first=config.use_data_before_expert_parallelism)
        mesh = alike_everywhere(mesh)
        check_sequence_size(config, mesh)
    except DeepSpeedError:
        mesh.release()  # or `deepspeed.utils.groups` would answer for an engine that never was
        raise
    return mesh


def batch_sizes(config: Config, mesh: Mesh, mpu: Any) -> BatchSizes:
    """Resolve the three batch sizes against the number of ranks that share a batch."""
    source = "mpu" if mpu is not None else "torch.distributed" if mesh.size("batch") > 1 else "one process"
    sharers = mesh.size("tensor")
    return config.batch_sizes(data_parallel_size=mesh.size("batch"), size_source=source, num_sharers=sharers)


def make_policy(config: Config, model: nn.Module) -> ZeroPolicy:
    """The placement table of the configured stage, with the configured dtypes; a model that is float64 throughout stays so
    where neither fp16 nor bf16 is asked for."""
    dtype = config.precision_dtype
    is_double = dtype is torch.float32 and {real_dtype(p) for p in model.parameters()} == {torch.float64}
    dtype = torch.float64 if is_double else dtype
    keeps_low_master = config.fp16.fp16_master_weights_and_grads or config.bf16.bf16_master_weights_and_grads
    return policy_of_stage(
        config.zero_optimization.stage,
        param_dtype=dtype,
        grad_dtype=config.data_types.grad_accum_dtype,
        master_dtype=dtype if keeps_low_master or is_double else torch.float32,
        param_tier=param_tier(config),
        optimizer_tier=optimizer_tier(config),
    )


def with_whole_states(policy: ZeroPolicy, optimizer: torch.optim.Optimizer | None) -> ZeroPolicy:
    """The policy that an optimizer can be stepped by: one that needs whole states has them whole, which one line says."""
    if not (isinstance(optimizer, AveragesItself) and optimizer.needs_whole_states and policy.optimizer.is_sharded):
        return policy
    if policy.gradients.is_sharded:
        return policy  # refused where it is stepped, with the reason
    warn_once(
        f"zero_optimization.stage = 1 shards nothing with {type(optimizer).__name__}: between two averages each rank steps whole "
        "parameters of its own, so all of its state is whole, as at stage 0. OneBitAdam shards its variance and masters."
    )
    return replace(policy, optimizer=replace(policy.optimizer, sharded_over=()))


def make_limits(config: Config) -> Limits:
    """Bucket and unit sizes in elements."""
    zero = config.zero_optimization
    return Limits(
        bucket_numel=max(1, min(zero.reduce_bucket_size, MAX_BUCKET_NUMEL)),
        persist_numel=zero.stage3_param_persistence_threshold,
        persist_total_numel=zero.stage3_model_persistence_threshold,
        max_unit_numel=max(1, zero.stage3_max_live_parameters // 4),
    )


def mark_leaves(module: nn.Module, config: Config) -> None:
    """Mark modules named by `zero_optimization.leaf_module` as units that are not opened."""
    leaf = config.zero_optimization.leaf_module
    for name, inner in module.named_modules():
        kind = type(inner)
        names = {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}
        if names & set(leaf.classes) or name in leaf.names or name.endswith(tuple(leaf.name_suffixes)):
            inner.__dict__[LEAF_MARK] = True


def as_lists(model_parameters: Iterable[Any] | None) -> list[Any] | None:
    """What a user gave as parameters or groups of them, which may be generators, to be read more than once."""
    if model_parameters is None:
        return None
    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        return [{**group, "params": list(group["params"])} for group in given]
    return given


def parameter_groups(model: nn.Module, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Parameter groups as dicts; default one group with every parameter of the model. Empty groups stay."""
    given = as_lists(model.parameters() if model_parameters is None else model_parameters)
    if given and isinstance(given[0], dict):
        return given
    return [{"params": given}] if given else []


def make_optimizer(
    config: Config, client: Any, groups: list[dict[str, Any]], model: nn.Module
) -> torch.optim.Optimizer | None:
    """The client's optimizer, or the configured one, or None. A callable gets the parameters."""
    if isinstance(client, torch.optim.Optimizer):
        return client
    if callable(client):
        return client([param for group in groups for param in group["params"]] if _is_flat(groups) else groups)
    if client is not None:
        raise DeepSpeedError(
            f"deepspeed.initialize(optimizer=...) is a {type(client).__name__}: neither a torch.optim.Optimizer nor a "
            "callable that makes one from parameters."
        )
    if config.optimizer is None or config.optimizer.type is None:
        return None
    if not any(group["params"] for group in groups):
        raise DeepSpeedConfigError(
            f"optimizer.type = {config.optimizer.type!r} has no parameters to train: model_parameters is empty.\n"
            "  Pass model.parameters(), or leave the optimizer out to only evaluate."
        )
    if config.optimizer.type.lower() == "muon":
        groups = split_for_muon(model.named_parameters(), groups)
    offload = config.zero_optimization.offload_optimizer
    # With a ratio below 1 one optimizer steps shards on both sides.
    steps_on_cpu = optimizer_tier(config) is not Tier.DEVICE and (offload is None or offload.ratio == 1)
    return build_optimizer(config.optimizer.type, dict(config.optimizer.params), groups, offload=steps_on_cpu)


def _is_flat(groups: Sequence[dict[str, Any]]) -> bool:
    return len(groups) == 1 and set(groups[0]) == {"params"}


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module, stage: int) -> None:
    """Refuse parameters that are not the model's, and tell of stages 1 and 2 without an optimizer.

    Fabric's `setup(model)` gives its one configuration to models that only evaluate, too; `backward` refuses those.
    """
    if optimizer is None:
        if stage in (1, 2):
            warn_once(
                f"zero_optimization.stage = {stage} shards optimizer state, but there is no optimizer: this engine keeps whole "
                'parameters on every rank and can only evaluate. To train pass optimizer=... or add an "optimizer" section.'
            )
        return
    if _needs_closure(optimizer):
        raise DeepSpeedError(
            f"{type(optimizer).__name__}.step needs a closure, which it calls as often as it likes to run the model again; "
            "a step of the engine comes after one backward, with its gradients.\n"
            "  Use an optimizer that steps from gradients, or this one on the model without deepspeed."
        )
    owned = set(model.parameters())
    strangers = sum(param not in owned for group in optimizer.param_groups for param in group["params"])
    if strangers:
        raise DeepSpeedError(
            f"{strangers} of the optimizer's parameters do not belong to the model; they would never be reduced or updated.\n"
            "  Build the optimizer from model.parameters() of the very model passed to deepspeed.initialize, after any "
            "change to it (adapters, resized embeddings), and a new one for each engine."
        )


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def group_indices(optimizer: torch.optim.Optimizer | None) -> dict[nn.Parameter, int]:
    """Each optimized parameter's group."""
    groups = optimizer.param_groups if optimizer is not None else []
    return {param: i for i, group in enumerate(groups) for param in group["params"]}


def open_disks(
    config: Config, mesh: Mesh, placing: Placing, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Open the nvme tier before anything is built, and see that the model fits it. Collective. Raises TierError."""
    if not (placing.policy.parameters.tier.is_on_disk or placing.policy.optimizer.tier.is_on_disk):
        return
    ranks = mesh.size("shard")
    numel, trained = (sum(full_numel(p) for p in model.parameters() if p.requires_grad or every) for every in (1, 0))
    states = optimizer.state_names.values() if isinstance(optimizer, StepsFused) else [torch.float32] * 2
    open_on_all_ranks(config, mesh, bytes_on_disk(placing, numel // ranks, trained // ranks, states))


def order_of_backward(model: nn.Module, masters: Sequence[Master]) -> list[int]:
    """The buckets in the order in which their last gradients will probably arrive: that of their first parameters,
    backwards. A guess until a step has been seen; buckets that are launched late keep their gradients for so long."""
    position = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    first = [min(position[name] for name in master.bucket.names) for master in masters]
    return sorted(range(len(masters)), key=lambda i: -first[i])


def make_scale(config: Config) -> StaticLossScale:
    """The loss scale: dynamic for fp16 unless a fixed one is given; 1 for everything else."""
    fp16 = config.fp16
    if not fp16.enabled:
        return StaticLossScale()
    if fp16.loss_scale > 0:
        return StaticLossScale(fp16.loss_scale)
    return DynamicLossScale(
        2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        min_scale=fp16.min_loss_scale,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def make_gradients(
    config: Config, mesh: Mesh, placing: Placing, masters: Sequence[Master], pool: FlatPool
) -> list[Gradients]:
    """The gradients of each trained bucket: how they are reduced (mean or sum, in which dtype on the wire, when), and
    where they rest."""
    policy = placing.policy
    is_mean = config.gradient_allreduce_op == "mean"
    if not is_mean and policy.parameters.is_sharded:
        raise DeepSpeedConfigError(
            'gradient_allreduce_op = "sum" is not for zero_optimization.stage = 3.\n  Use "mean", or a stage below 3.'
        )
    predivide = config.gradient_predivide_factor if config.prescale_gradients else 1.0
    wire_dtype = config.communication_data_type
    if wire_dtype is None and mesh.size("sequence") > 1:
        wire_dtype = config.seq_parallel_communication_data_type
    replicas = mesh.exchange("replicate", "reduce", placing.device) if mesh.size("replicate") > 1 else None
    made = []
    num_averaged = mesh.size("average") // mesh.size("replicate")
    exchanges: dict[str, Exchange] = {"shard": mesh.exchange("shard", "reduce", placing.device)}
    for master in masters:
        rest = gradient_rest(placing, master)
        # An expert's gradient is a sum over the tokens of all ranks already where it arrives; what is left is to add up
        # its copies'. It is divided by as many ranks as every other, so that it does not depend on where experts are.
        if master.bucket.over not in exchanges:
            exchanges[master.bucket.over] = mesh.exchange(master.bucket.over, "reduce", placing.device)
        exchange, feedback = gradient_exchange(config, mesh, exchanges[master.bucket.over], master.bucket)
        # One rank's shard is the whole: nothing to scatter, so micro-batches may add up in the flat buffer.
        is_scattered = policy.gradients.is_sharded and (exchange.world_size > 1 or rest is not None)
        reduction = Reduction(
            exchange=exchange,
            feedback=feedback,
            replicas=replicas,
            predivide=predivide,
            divide_by=(num_averaged if is_mean else 1.0) / predivide,
            wire_dtype=wire_dtype,
            when=When.EACH_BACKWARD if is_scattered else When.AT_BOUNDARY,
        )
        made.append(
            gradients_of_bucket(
                master.bucket,
                reduction,
                policy.gradients.dtype,
                pool,
                delivers_shard=policy.optimizer.is_sharded,
                rest=rest,
            )
        )
    return made


def gradients_of_bucket(
    bucket: Bucket,
    reduction: Reduction,
    dtype: torch.dtype,
    pool: FlatPool,
    *,
    delivers_shard: bool,
    rest: Rest | None = None,
) -> Gradients:
    """The gradients of a bucket whose reduction is `reduction`; they rest in the device's memory, or at `rest`.

    delivers_shard: the optimizer reads this rank's slice, not the whole.
    """
    if reduction.when is not When.EACH_BACKWARD:
        return WholeGradients(bucket, reduction, dtype, pool, delivers_shard=delivers_shard, rest=rest)
    if rest is None:
        return SlicedGradients(bucket, reduction, dtype, pool)
    return TieredGradients(bucket, reduction, dtype, pool, rest)


def limit_in_flight(config: Config, placing: Placing, masters: Sequence[Master]) -> Limit:
    """How much may be reduced at once.

    Where parameters are sharded a launch never keeps the host waiting: another rank may need a gather from us before it comes to
    launch its side of the reduction, and we would wait for each other. Those that are done are taken in all the same.
    """
    keeps_host = any(waits_on_host(master.bucket.exchange.group, master.bucket.full.device) for master in masters)
    # The second hop of a quantized reduction is started by who waits for it.
    if placing.policy.parameters.is_sharded and (keeps_host or config.zero_optimization.zero_quantized_gradients):
        return UNLIMITED
    return Limit(MAX_IN_FLIGHT, UNLIMITED.nbytes if keeps_host else MAX_NBYTES_IN_FLIGHT)


def make_reducer(
    config: Config,
    mesh: Mesh,
    placing: Placing,
    masters: Sequence[Master],
    should_reduce: Callable[[], bool],
    on_complete: Callable[[Bucket], None] | None,
) -> Reducer:
    """The reducer of an engine, with the pool that its buckets borrow from."""
    pool = FlatPool()
    return Reducer(
        make_gradients(config, mesh, placing, masters, pool),
        pool,
        in_flight=limit_in_flight(config, placing, masters),
        overlap=config.zero_optimization.overlap_comm is not False,
        should_reduce=should_reduce,
        on_complete=on_complete,
    )


def make_scheduler(config: Config, client: Any, optimizer: torch.optim.Optimizer | None, client_optimizer: Any) -> Any:
    """The client's scheduler (object, or callable on the wrapped optimizer), the configured one, or None."""
    if optimizer is None:
        return None
    if client is not None:
        is_object = hasattr(client, "step")
        if isinstance(client, torch.optim.lr_scheduler.LRScheduler) and not isinstance(
            client_optimizer, torch.optim.Optimizer
        ):
            raise DeepSpeedError(
                "lr_scheduler is an object, but the optimizer it schedules is not the one that will be stepped.\n"
                "  Pass optimizer=<the optimizer object it was built on>, or lr_scheduler=<a callable taking the optimizer>."
            )
        return client if is_object or not callable(client) else client(optimizer)
    if config.scheduler is None or config.scheduler.type is None:
        return None
    return build_scheduler(config.scheduler.type, dict(config.scheduler.params), optimizer)


def cast_buffers(module: nn.Module, config: Config) -> None:
    """Floating buffers to the model's dtype, or to `data_types.buffer_dtype`; those that must stay fp32 stay."""
    dtype = config.data_types.buffer_dtype or config.precision_dtype
    if dtype is torch.float32:
        return
    keep = config.data_types.keep_in_fp32_modules
    kept = ["inv_freq", "quantized.scales", "quantized.minima"]
    if keep == "auto":
        for inner in module.modules():
            for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
                kept += list(inspect.getattr_static(inner, attribute, None) or ())
    else:
        kept += list(keep)
    for owner_name, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            is_cast = (
                buffer.is_floating_point() and buffer.dtype.itemsize > 1
            )  # float8 is a packed table, not arithmetic
            if is_cast and not any(part in f"{owner_name}.{name}" for part in kept):
                owner._buffers[name] = buffer.to(dtype)
