"""Section `zero_optimization`: what is sharded, what is offloaded, and how much travels at once.

Read by `deepspeed.zero` and the engine. The four stages are rows of the placement table (`zero/policy.py`); the other
fields tune communication and memory. Every stage 3 key may also be written without its `stage3_`.

Sources: ZeRO (arXiv:1910.02054), ZeRO-Offload (2101.06840), ZeRO-Infinity (2104.07857), ZeRO++ (2306.10209), MiCS
(2205.00119), ZenFlow (2505.12242).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AliasChoices, AliasGenerator, ConfigDict, Field

from deepspeed.config.base import (
    Fraction,
    Int,
    Names,
    NonNegativeInt,
    OldKey,
    PositiveInt,
    PositiveSize,
    Problem,
    Section,
    Size,
)

OffloadDevice = Literal["none", "cpu", "nvme"]


def _nvme_needs_a_path(device: OffloadDevice, nvme_path: Path | None) -> Iterator[Problem]:
    if device == "nvme" and nvme_path is None:
        yield Problem(
            ("device", "nvme_path"), "offload to nvme needs a folder on that disk", "Set nvme_path, or use device cpu."
        )


class OffloadParamConfig(Section):
    """`offload_param`: where sharded parameters rest between uses. ZeRO stage 3."""

    device: OffloadDevice = "none"
    """The tier; "none" keeps them on the device."""
    nvme_path: Path | None = None
    """Folder for the files; needed when `device` is nvme."""
    buffer_count: NonNegativeInt = 5
    """Buffers in the pool between disk and device."""
    buffer_size: Size = 100_000_000
    """Elements in each of those buffers."""
    max_in_cpu: Size = 1_000_000_000
    """Elements that stay in CPU memory although `device` is nvme."""
    pin_memory: bool = True
    """Pin the CPU memory, so that copies to the device overlap with compute."""

    def rules(self) -> Iterator[Problem]:
        """nvme needs its folder."""
        return _nvme_needs_a_path(self.device, self.nvme_path)


class OffloadOptimizerConfig(Section):
    """`offload_optimizer`: where master weights and optimizer states rest, and where the step is computed."""

    device: OffloadDevice = "none"
    """The tier; "none" keeps them on the device. nvme needs ZeRO stage 3."""
    nvme_path: Path | None = None
    """Folder for the files; needed when `device` is nvme."""
    buffer_count: NonNegativeInt = 4
    """Buffers for states in flight; at least the number of tensors per parameter, parameter and gradient included."""
    pin_memory: bool = True
    """Pin the CPU memory, so that copies to the device overlap with compute."""
    pipeline_read: bool = False
    """Read the next sub-group while this one is stepped."""
    pipeline_write: bool = False
    """Write the previous sub-group while this one is stepped."""
    fast_init: bool = False
    """Create the files without writing zeros first."""
    ratio: Fraction = 1.0
    """Share of parameters that the CPU steps; the rest is stepped on the device. Below 1 needs ZeRO stage 3."""
    super_offload: bool = False
    """The path for CPU and GPU on one fast link (Superchips). Needs ZeRO stage 3."""
    cpuadam_cores_perc: Fraction = 0.8
    """Share of the CPU cores for the optimizer of `super_offload`."""

    @property
    def pipeline(self) -> bool:
        """Whether reads or writes overlap with the step."""
        return self.pipeline_read or self.pipeline_write

    def rules(self) -> Iterator[Problem]:
        """nvme needs its folder."""
        return _nvme_needs_a_path(self.device, self.nvme_path)


class ZenFlowConfig(Section):
    """`zenflow`: update the most important gradients on the device at once and the others on the CPU, later."""

    topk_ratio: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of gradient columns that counts as important."""
    select_strategy: Literal["auto", "step", "epoch"] = "auto"
    """What `select_interval` counts; "auto" selects again when gradients drift."""
    select_interval: Literal["auto"] | PositiveInt = "auto"
    """Steps or epochs between selections; a number exactly when the strategy is step or epoch."""
    update_interval: Literal["auto"] | PositiveInt = "auto"
    """Steps between updates on the CPU; at most `select_interval`. It replaces gradient_accumulation_steps."""
    overlap_step: bool = False
    """Run the CPU's update during the next forward and backward."""
    offload: bool = False
    """Rest the selected states on the CPU as well."""
    auto_ratio: Fraction = 0.99
    """With "auto": how much of the gradient norm the selection must hold before it is made again."""
    full_warm_up_rounds: NonNegativeInt = 0
    """Steps at the start that update everything."""
    pt_reserved_cores_perc: Fraction = 0.5
    """Share of CPU cores left to PyTorch."""
    steps_per_epoch: PositiveInt | None = None
    """Steps in an epoch; needed by the strategy epoch where no data loader tells."""

    def rules(self) -> Iterator[Problem]:
        """The strategy and its interval; the order of the two intervals."""
        is_auto = self.select_strategy == "auto"
        if is_auto != (self.select_interval == "auto"):
            yield Problem(
                ("select_strategy", "select_interval"),
                "the strategies step and epoch need a number, the strategy auto takes none",
                'Leave select_interval out, or choose the strategy "step" or "epoch" and give a number.',
            )
        select, update = self.select_interval, self.update_interval
        if isinstance(select, int) and isinstance(update, int) and update > select:
            yield Problem(
                ("update_interval", "select_interval"),
                "an update cannot be rarer than a selection",
                f"Set update_interval to at most {select}.",
            )


class LeafModuleConfig(Section):
    """`leaf_module`: modules whose parameters are gathered and freed as one unit at ZeRO stage 3.

    For modules that run their children by what the data says, such as mixtures of experts.
    """

    classes: Names = (
        "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    )
    """Classes, by name or full path."""
    names: Names = ()
    """Full names of modules in the model."""
    name_suffixes: Names = ()
    """Endings of such names."""


class LocoConfig(Section):
    """`zeropp_loco_param`: feed the error of quantized gradients back into the next step (LoCo)."""

    err_beta: Fraction = 0.8
    """Weight of the old error in the moving average."""
    reset_T: PositiveInt = 1024  # noqa: N815
    """Steps between resets of the error."""


def _cpu_device(value: Any) -> Any:
    """The offload section that a true or false `cpu_offload` means; another value as it is, for validation."""
    return {"true": {"device": "cpu"}, "1": {"device": "cpu"}, "false": None, "0": None}.get(str(value).lower(), value)


def _with_and_without_stage3(name: str) -> AliasChoices | str:
    return AliasChoices(name, name.removeprefix("stage3_")) if name.startswith("stage3_") else name


class ZeroConfig(Section):
    """`zero_optimization`: which of parameters, gradients and optimizer states are sharded over data-parallel ranks."""

    model_config = ConfigDict(alias_generator=AliasGenerator(validation_alias=_with_and_without_stage3))

    old_keys: ClassVar[Mapping[str, OldKey]] = {
        "cpu_offload": OldKey("offload_optimizer", _cpu_device),
        "cpu_offload_param": OldKey("offload_param", _cpu_device),
        "cpu_offload_use_pin_memory": OldKey(None),
        "stage3_gather_fp16_weights_on_model_save": OldKey("stage3_gather_16bit_weights_on_model_save"),
    }

    stage: Annotated[Int, Ge(0), Le(3)] = 0
    """0 shards nothing, 1 the optimizer states, 2 also the gradients, 3 also the parameters."""
    contiguous_gradients: bool = True
    """Copy gradients into one flat buffer as they come. Always so here; no effect."""
    reduce_scatter: bool = True
    """Send each rank its piece only. Follows from the placement of gradients here; no effect."""
    reduce_bucket_size: PositiveSize = 500_000_000
    """Elements reduced together, at most 8 Mi of them: beyond that the network is used no better and less overlaps."""
    use_multi_rank_bucket_allreduce: bool = True
    """One all-reduce for a bucket that belongs to several ranks. Every bucket does here; no effect."""
    allgather_partitions: bool = True
    """Gather updated parameters with an all-gather rather than broadcasts. Always so here; no effect."""
    allgather_bucket_size: Size = 500_000_000
    """Elements gathered together after a step."""
    overlap_comm: bool | None = None
    """Reduce gradients while backward runs, at every stage; true when not given."""
    compute_grad_norm: bool = True
    """Compute the global gradient norm. False needs stage 1 or 2 and `gradient_clipping` 0, and has no effect here."""
    load_from_fp32_weights: bool = True
    """Take master weights from the checkpoint, rather than from its lower-precision model weights."""
    elastic_checkpoint: bool = False
    """Save states so that another number of ranks can load them. Every checkpoint here can be; no effect."""
    offload_param: OffloadParamConfig | None = None
    """Where parameters rest between uses; stage 3."""
    offload_optimizer: OffloadOptimizerConfig | None = None
    """Where master weights and optimizer states rest."""
    zenflow: ZenFlowConfig | None = None
    """Split updates between device and CPU; needs `offload_optimizer`."""
    sub_group_size: Size = 1_000_000_000
    """Elements stepped together, and moved together to and from a tier."""
    stage3_prefetch_bucket_size: Size = 50_000_000
    """Elements gathered ahead of use, whatever their dtype, as everywhere in this section: in bf16 half the bytes of fp32."""
    stage3_param_persistence_threshold: Size = 100_000
    """Parameters with fewer elements stay full: gathering them costs more than it saves."""
    stage3_model_persistence_threshold: Size = sys.maxsize
    """Elements that may stay full in total."""
    stage3_max_live_parameters: Size = 1_000_000_000
    """Elements that may be full at once; prefetch stops there."""
    stage3_max_reuse_distance: Size = 1_000_000_000
    """A parameter used again within this many elements stays full in between."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Let `save_16bit_model` gather the whole model; needs the memory on rank 0."""
    stage3_module_granularity_threshold: NonNegativeInt = 0
    """Modules with fewer parameters per descendant than this are gathered as one unit; 0 switches it off."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Gather by an all-reduce of zero-padded buffers, for links where that is faster."""
    stage3_allgather_sequential: bool = False
    """Gather one parameter at a time, without prefetch; least memory."""
    ignore_unused_parameters: bool = True
    """Allow parameters that get no gradient; they contribute zeros."""
    legacy_stage1: bool = False
    """The first implementation of stage 1; only false."""
    round_robin_gradients: bool = False
    """Spread gradient copies to the CPU over ranks. Slices are even here; no effect."""
    parameter_alignment: bool = False
    """Start each parameter on a 16-byte boundary in the flat space; stages 1 and 2."""
    zero_hpz_partition_size: NonNegativeInt = 1
    """Ranks that share a second copy of the parameters for backward, usually those of one node (ZeRO++ hpZ)."""
    zero_quantized_weights: bool = False
    """Send int8 parameters in all-gathers (ZeRO++ qwZ)."""
    zero_quantized_nontrainable_weights: bool = False
    """Store frozen parameters quantized."""
    zero_quantized_gradients: bool = False
    """Send int4 gradients in reductions (ZeRO++ qgZ)."""
    zeropp_loco_param: LocoConfig | None = None
    """Error feedback for `zero_quantized_gradients`."""
    mics_shard_size: Annotated[Int, Ge(-1)] = -1
    """Ranks over which stage 3 shards; replicas beyond (MiCS, HSDP). -1 shards over all."""
    mics_hierarchical_params_gather: bool = False
    """Gather within a node first, then between nodes."""
    memory_efficient_linear: bool = True
    """Replace `F.linear` by one that saves less. Views survive resharding here; no effect."""
    pipeline_loading_checkpoint: bool = False
    """Load checkpoints rank after rank, so that a node's memory holds one at a time; stage 3."""
    override_module_apply: bool = True
    """Let `Module.apply` see full parameters at stage 3."""
    log_trace_cache_warnings: bool = False
    """Say when modules run in another order than traced. It is a normal path here."""
    enable_sanity_checks: bool = False
    """Check internal consistency in each step; slow."""
    save_muon_momentum_buffer_in_memory: bool = False
    """Keep Muon's momentum in memory although states rest on nvme; stage 3."""
    leaf_module: LeafModuleConfig = Field(default_factory=LeafModuleConfig)
    """Modules gathered as one unit."""

    def rules(self) -> Iterator[Problem]:
        """What needs which stage."""
        if self.legacy_stage1:
            yield Problem(("legacy_stage1",), "the old stage 1 does not exist any more", "Remove the key.")
        if not self.compute_grad_norm and self.stage not in (1, 2):
            yield Problem(
                ("compute_grad_norm", "stage"),
                "the norm can be left out at stages 1 and 2 only",
                "Remove compute_grad_norm, or use stage 1 or 2.",
            )
        if self.offload_optimizer is not None and self.stage != 3:
            yield from self._stage_3_offload(self.offload_optimizer)

    def _stage_3_offload(self, offload: OffloadOptimizerConfig) -> Iterator[Problem]:
        for key, is_used in {
            "device": offload.device == "nvme",
            "ratio": offload.ratio < 1,
            "super_offload": offload.super_offload,
        }.items():
            if is_used:
                yield Problem(
                    (f"offload_optimizer.{key}", "stage"),
                    "this needs ZeRO stage 3",
                    f"Set stage to 3, or change {key}.",
                )

    def notes(self) -> Iterator[str]:
        """Keys of another stage."""
        if self.offload_param is not None and self.offload_param.device != "none" and self.stage != 3:
            yield (
                f"zero_optimization.offload_param has no effect at stage {self.stage}: "
                "parameters are sharded, and offloaded, at stage 3 only."
            )
