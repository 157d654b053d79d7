"""Predict the peak memory of a rank, on each tier, before anything is allocated.

    estimate(model, config, batch, world_size=8)        one engine
    survey(model, config, batch, world_size=8)          every stage x offload x checkpointing, one trace each way

Called by users (`deepspeed.memory`), by `deepspeed estimate`, and by the recomputation budget. Traces the model once
(`memory.trace`), cuts it as the engine would (`zero.plan`), and plays an engine to the trace (`memory.replay`). The
engine's own functions read the configuration (`assembly.assemble`), so there is one meaning of every key.

What is predicted is what an allocator hands out: the CPU's as torch's profiler counts it, an accelerator's
`max_memory_allocated`. Beyond that an estimate names an allowance: what rounding every block to the caching allocator's
granules adds at the peak.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.activation.blocks import Recompute
from deepspeed.assembly import assemble
from deepspeed.config import Config, load_config
from deepspeed.memory.experts import check_ranks, expert_ranks, learned, spread_experts
from deepspeed.memory.layers import cut_layers, layer_ranks
from deepspeed.memory.ledger import Ledger
from deepspeed.memory.messages import NO_UNSHARDS, CountingReplay, Messages, Unshards
from deepspeed.memory.parts import exchanged, part_of, say_inputs
from deepspeed.memory.quantized_notes import quantized_notes
from deepspeed.memory.replay import EngineSettings, Given, Replay
from deepspeed.memory.trace import Trace, trace_step
from deepspeed.optim import build_optimizer
from deepspeed.optim.traits import AveragesItself
from deepspeed.parallel.expert.listed import Block
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.param import full_shape, slot_of
from deepspeed.zero.plan import ModelPlan, plan_model
from deepspeed.zero.policy import Tier
from deepspeed.zero.tiers_from_config import make_placing

_OBJECTS: Any = {"tensor_parallel": {"mpu", "tp_group"}}
"""What the section `tensor_parallel` may have from Python, and what no prediction asks for."""
ASSUMED_OPTIMIZER = "AdamW"
"""What is predicted where neither the configuration nor the caller names an optimizer."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The predicted memory of one rank. Bytes; "device" is the accelerator's memory, on a CPU-only machine main memory."""

    world_size: int
    stage: int
    dtype: torch.dtype
    recompute: str
    ledger: Ledger
    fast_network: Ledger
    """The same with one reduction on the wire at a time: each is done before the next begins."""
    num_params: int
    flops: int
    """Of the rank's micro-batch, forward and backward, without recomputation."""
    messages: Mapping[str, Messages]
    """What the rank sends in a step, by operation."""
    unshards: Unshards = NO_UNSHARDS
    """Those of its all-gathers that modules stand still for."""
    notes: Sequence[str] = ()

    @property
    def peak_nbytes(self) -> int:
        """The highest total on the device."""
        return self.ledger.peaks[Tier.DEVICE].nbytes

    @property
    def low_nbytes(self) -> int:
        """The same if the network is never behind; a run is between this and `peak_nbytes`, as its network is."""
        return self.fast_network.peaks[Tier.DEVICE].nbytes

    @property
    def phase(self) -> str:
        """When that is: initialize, forward, backward or step."""
        return self.ledger.peaks[Tier.DEVICE].phase

    @property
    def by_kind(self) -> dict[str, int]:
        """The device's bytes by kind at its peak."""
        return dict(self.ledger.peaks[Tier.DEVICE].by_kind)

    @property
    def allowance_nbytes(self) -> int:
        """What rounding the blocks of that moment to the caching allocator's granules adds."""
        return self.ledger.peaks[Tier.DEVICE].rounding_nbytes

    def on(self, tier: Tier | str) -> int:
        """The highest total on a tier: "device", "cpu" or "nvme"."""
        return self.ledger.peaks[Tier(tier)].nbytes


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments it is given to the model as: a mapping by name, a tuple in order, else alone."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


class Played(NamedTuple):
    """An engine to be played: what the model does, its buckets, the settings that decide about memory."""

    trace: Trace
    plan: ModelPlan
    settings: EngineSettings
    notes: Sequence[str]


class Estimator:
    """Estimates of one model and batch shape; traces are kept and shared by all configurations that compute alike."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        device_type: str | None = None,
        optimizer: Any = None,
        loss_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._model = model
        self.args, self.kwargs = as_call(batch)
        self.device_type = device_type or get_accelerator().device_name()
        self._optimizer = optimizer
        self._loss_of = loss_of
        self._traces: dict[Any, Trace] = {}

    def estimate(
        self, config: Any, *, world_size: int = 1, plan: Sequence[Recompute] | None = None, bounds: bool = True
    ) -> Estimate:
        """Predict for a configuration (dict, path or `Config`) on `world_size` data-parallel ranks.

        With `sequence_parallel_size` P the batch has whole sequences, of which each rank has a part; with `autotp_size` t the model
        is whole, and a rank that has the first parts of its layers is predicted. `world_size` counts all ranks.
        plan: what each block recomputes, over the configuration's `activation_checkpointing.recompute`. bounds: play the
        fast network too; without, `low_nbytes` is the peak.
        """
        config = config if isinstance(config, Config) else load_config(config)
        made = self.engine(config, world_size=world_size, plan=plan)

        played = CountingReplay(made.trace, made.plan, made.settings)
        ledger = played.run()
        one_at_a_time = dataclasses.replace(made.settings, max_in_flight=1)
        recompute = config.activation_checkpointing.recompute if plan is None else _name_of(plan)
        return Estimate(
            world_size=world_size,
            stage=config.zero_optimization.stage,
            dtype=made.settings.policy.parameters.dtype,
            recompute=recompute,
            ledger=ledger,
            fast_network=Replay(made.trace, made.plan, one_at_a_time).run() if bounds else ledger,
            num_params=sum(param.numel() for param in made.trace.params),
            flops=made.trace.flops.model,
            messages=played.messages(),
            unshards=played.unshards(),
            notes=made.notes,
        )

    def engine(self, config: Config, *, world_size: int, plan: Sequence[Recompute] | None = None) -> Played:
        """What an engine of this configuration would be made of, to be played (`memory.replay`)."""
        if world_size < 1:
            raise DeepSpeedError(f"world_size = {world_size}: a prediction needs at least one rank.\n  Give 1 or more.")
        parts = config.sequence_parallel_size or 1
        if world_size % parts:
            raise DeepSpeedError(f"sequence_parallel_size = {parts} does not divide world_size = {world_size}.")
        sharers = layer_ranks(config)
        if world_size % (parts * sharers):
            raise DeepSpeedError(f"tensor_parallel.autotp_size = {sharers} does not divide world_size = {world_size}.")
        world_size //= sharers
        ep = expert_ranks(self._model, config)
        check_ranks(ep, world_size)
        trace = self.trace(config, plan)
        assemble.mark_leaves(trace.model, config)
        optimizer, notes = self._make_optimizer(trace.model, config)
        notes = [*notes, *quantized_notes(self._model, config)]
        policy = assemble.with_whole_states(assemble.make_policy(config, trace.model), optimizer)
        zero = config.zero_optimization
        shard_size = zero.mics_shard_size if zero.mics_shard_size > 0 else world_size
        placing = make_placing(config, policy, torch.device(self.device_type))
        settings = EngineSettings(
            placing=placing,
            shard_size=shard_size,
            num_replicas=world_size // shard_size,
            sends_directly=self.device_type == "cpu",
            accumulation=config.gradient_accumulation_steps or 1,
            sub_group_numel=zero.sub_group_size,
            prefetch_numel=zero.stage3_prefetch_bucket_size,
            max_live_numel=zero.stage3_max_live_parameters,
            max_reuse_distance=zero.stage3_max_reuse_distance,
            wire_dtype=config.communication_data_type or policy.gradients.dtype,
            state_nbytes=state_nbytes_per_element(optimizer, policy.optimizer.dtype),
            beside_nbytes=(
                optimizer.nbytes_beside(world_size, policy.optimizer.is_sharded)
                if isinstance(optimizer, AveragesItself)
                else 0.0
            ),
            given=_all_given(self._model, trace.model, zero.stage),
            cut_nbytes=_cut_nbytes(self._model, trace.model, zero.stage) if sharers * ep > 1 else 0,
        )
        groups, limits = assemble.group_indices(optimizer), assemble.make_limits(config)
        planned = plan_model(trace.model, groups, placing, limits, shard_size, max(1, shard_size // ep))
        return Played(trace, planned, settings, notes)

    def trace(self, config: Config, plan: Sequence[Recompute] | None = None) -> Trace:
        """The step that is predicted from; kept."""
        recompute = config.activation_checkpointing.recompute
        chosen: Any = tuple(plan) if plan is not None else Recompute(recompute)
        autocast = config.torch_autocast
        low = (autocast.dtype or torch.bfloat16) if autocast.enabled else None
        parts, sharers = config.sequence_parallel_size or 1, layer_ranks(config)
        section = config.tensor_parallel.model_dump_json(exclude=_OBJECTS) if sharers > 1 else ""
        spread = config.expert_parallel.model_dump_json() if config.expert_parallel.enabled else ""
        key = config.precision_dtype, config.data_types.buffer_dtype, low, chosen, parts, section, spread
        if key not in self._traces:
            args, kwargs = part_of((self.args, self.kwargs), parts) if parts > 1 else (self.args, self.kwargs)
            with exchanged(parts):
                self._traces[key] = trace_step(
                    self._model,
                    args,
                    kwargs,
                    dtype=config.precision_dtype,
                    device_type=self.device_type,
                    autocast=low,
                    plan=list(chosen) if isinstance(chosen, tuple) else chosen,
                    prepare=functools.partial(prepare_part, config, learned(self._model, config)),
                    loss_of=self._loss_of,
                )
        return self._traces[key]

    def _make_optimizer(self, model: nn.Module, config: Config) -> tuple[torch.optim.Optimizer, list[str]]:
        groups = assemble.parameter_groups(model, None)
        if callable(self._optimizer):
            return self._optimizer([param for group in groups for param in group["params"]]), []
        made = assemble.make_optimizer(config, None, groups, model)
        if made is not None:
            return made, []
        note = f"the configuration names no optimizer; {ASSUMED_OPTIMIZER} is assumed"
        return build_optimizer(ASSUMED_OPTIMIZER, {}, groups), [note]


def prepare_part(config: Config, blocks: Mapping[str, Block], model: nn.Module) -> None:
    """Have `model`, which has shapes only, be the first rank's part. `blocks`: what was `learned` of the user's."""
    assemble.cast_buffers(model, config)
    cut_layers(model, config)
    spread_experts(model, config, blocks)
    if (parts := config.sequence_parallel_size or 1) > 1:
        model.register_forward_pre_hook(functools.partial(say_inputs, parts), with_kwargs=True)


def _cut_nbytes(whole: nn.Module, part: nn.Module, stage: int) -> int:
    """What the user's parameters have in the device's memory beyond a rank's parts of them."""
    own = {name: param.numel() for name, param in part.named_parameters()}
    return sum(
        (full_shape(param).numel() - own.get(name, 0)) * param.element_size()
        for name, param in whole.named_parameters()
        if _given(param, stage).tier is not None
    )


def _all_given(whole: nn.Module, part: nn.Module, stage: int) -> list[Given]:
    """For each parameter of the first rank where the user's of that name is: of a list of experts it has the first ones."""
    users = dict(whole.named_parameters())
    return [_given(users[name], stage) for name, _ in part.named_parameters()]


def _given(param: Tensor, stage: int) -> Given:
    """Where a parameter is before the engine is made. Meta tensors stand for what the host holds, or `zero.Init` makes."""
    if slot_of(param) is not None or (param.is_meta and stage == 3):
        return Given(param.dtype, None)
    return Given(param.dtype, Tier.CPU if param.device.type in ("cpu", "meta") else Tier.DEVICE)


def _name_of(plan: Sequence[Recompute]) -> str:
    kinds = {recompute.value for recompute in plan}
    return kinds.pop() if len(kinds) == 1 else "some blocks"


def state_nbytes_per_element(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> tuple[float, ...]:
    """Bytes of state that an optimizer keeps per element, by group: found by stepping a small tensor of each."""
    side = 8
    found = []
    for group in optimizer.param_groups:
        param = nn.Parameter(torch.zeros(side, side, dtype=dtype))
        param.grad = torch.zeros_like(param)
        twin = type(optimizer)([{**group, "params": [param]}])  # type: ignore[call-arg]
        twin.step()
        state = twin.state[param].values()
        found.append(sum(v.nbytes for v in state if isinstance(v, Tensor) and v.dim() > 0) / side**2)
    return tuple(found)


def estimate(model: nn.Module, config: Any, batch: Any, *, world_size: int = 1, **options: Any) -> Estimate:
    """Predict the peak memory of a rank. Nothing is allocated and no rank is started.

    model: an nn.Module, on any device; "meta" costs nothing. config: dict, path, base64 or Config. batch: a micro-batch
    as the model takes it (a tuple in order, a mapping by name); only shapes and dtypes count, so meta tensors do.
    world_size: all ranks. options: `device_type` ("cuda", "cpu", ...; default: this machine's), `optimizer` (a
    callable on parameters, over the configuration's), `loss_of` (from the model's output to the scalar to differentiate).

    Raises TraceError where the model looks at values; DeepSpeedConfigError for a configuration that contradicts itself.
    """
    return Estimator(model, batch, **options).estimate(config, world_size=world_size)
