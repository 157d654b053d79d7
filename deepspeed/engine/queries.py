"""The engine's questions about its configuration: one method per key, generated from tables.

Only here because scripts and integrations ask in this form (`engine.zero_optimization_stage()`); inside the package
the configuration itself is passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed.config import Config

_PATHS: dict[str, str] = {
    "zero_optimization_stage": "zero_optimization.stage",
    "zero_offload_optimizer": "zero_optimization.offload_optimizer",
    "zero_offload_param": "zero_optimization.offload_param",
    "zero_gather_16bit_weights_on_model_save": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "fp16_enabled": "fp16.enabled",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "bfloat16_enabled": "bf16.enabled",
    "initial_dynamic_scale": "fp16.initial_scale_power",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "torch_autocast_dtype": "torch_autocast.dtype",
    "gradient_clipping": "gradient_clipping",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "prescale_gradients": "prescale_gradients",
    "postscale_gradients": "prescale_gradients",
    "steps_per_print": "steps_per_print",
    "wall_clock_breakdown": "wall_clock_breakdown",
    "memory_breakdown": "memory_breakdown",
    "dump_state": "dump_state",
    "aio_config": "aio",
    "dataloader_drop_last": "dataloader_drop_last",
    "swap_tensor_config": "aio",
    "flops_profiler_enabled": "flops_profiler.enabled",
    "flops_profiler_profile_step": "flops_profiler.profile_step",
    "flops_profiler_module_depth": "flops_profiler.module_depth",
    "flops_profiler_top_modules": "flops_profiler.top_modules",
    "flops_profiler_detailed": "flops_profiler.detailed",
    "flops_profiler_output_file": "flops_profiler.output_file",
    "flops_profiler_recompute_fwd_factor": "flops_profiler.recompute_fwd_factor",
    "autotuning_enabled": "autotuning.enabled",
    "autotuning_start_profile_step": "autotuning.start_profile_step",
    "autotuning_end_profile_step": "autotuning.end_profile_step",
    "autotuning_metric_path": "autotuning.metric_path",
    "autotuning_metric": "autotuning.metric",
    "curriculum_learning_enabled": "data_efficiency.data_sampling.curriculum_learning.enabled",
    "random_ltd_enabled": "data_efficiency.data_routing.random_ltd.enabled",
    "data_efficiency_enabled": "data_efficiency.enabled",
    "curriculum_enabled_legacy": "curriculum_learning.enabled",
    "pld_enabled": "progressive_layer_drop.enabled",
    "pld_theta": "progressive_layer_drop.theta",
    "pld_gamma": "progressive_layer_drop.gamma",
    "eigenvalue_enabled": "eigenvalue.enabled",
    "amp_enabled": "amp.enabled",
    "sparse_gradients_enabled": "sparse_gradients",
    "elasticity_enabled": "elasticity.enabled",
}
_ZERO_KEYS = (
    "allow_untested_optimizer overlap_comm reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size "
    "contiguous_gradients elastic_checkpoint load_from_fp32_weights sub_group_size round_robin_gradients "
    "ignore_unused_parameters legacy_stage1 hpz_partition_size quantized_weights quantized_nontrainable_weights "
    "quantized_gradients multi_rank_bucket_allreduce"
).split()
_IRREGULAR = {
    "allow_untested_optimizer": "zero_allow_untested_optimizer",
    "multi_rank_bucket_allreduce": "zero_optimization.use_multi_rank_bucket_allreduce",
    "hpz_partition_size": "zero_optimization.zero_hpz_partition_size",
    "quantized_weights": "zero_optimization.zero_quantized_weights",
    "quantized_nontrainable_weights": "zero_optimization.zero_quantized_nontrainable_weights",
    "quantized_gradients": "zero_optimization.zero_quantized_gradients",
}
_PATHS |= {f"zero_{key}": _IRREGULAR.get(key, f"zero_optimization.{key}") for key in _ZERO_KEYS}


def _query(path: str) -> Callable[[Any], Any]:
    def answer(self: Any) -> Any:
        node: Any = self._config
        for key in path.split("."):
            node = None if node is None else getattr(node, key)
        return node

    answer.__doc__ = f"The configuration's `{path}`."
    return answer


class ConfigQueries:
    """Mixin of the engine: `engine.<question>()` for every key above, and those with a rule of their own."""

    _config: Config

    def zero_optimization(self) -> bool:
        """Whether a ZeRO stage above 0 is on."""
        return self._config.zero_optimization.stage > 0

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self._config.zero_optimization.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self._config.zero_optimization.stage >= 3

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer state rests off the device."""
        offload = self._config.zero_optimization.offload_optimizer
        return offload is not None and offload.device != "none"

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether the optimizer steps on the CPU."""
        return self.zero_cpu_offload()

    def optimizer_name(self) -> str | None:
        """The configured optimizer type, or None."""
        return self._config.optimizer.type if self._config.optimizer else None

    def optimizer_params(self) -> dict[str, Any] | None:
        """The configured optimizer's params, or None."""
        return dict(self._config.optimizer.params) if self._config.optimizer else None

    def scheduler_name(self) -> str | None:
        """The configured scheduler type, or None."""
        return self._config.scheduler.type if self._config.scheduler else None

    def scheduler_params(self) -> dict[str, Any] | None:
        """The configured scheduler's params, or None."""
        return dict(self._config.scheduler.params) if self._config.scheduler else None

    def loss_scale(self) -> float:
        """By how much the loss is multiplied before backward."""
        return self._zero.scale_guard.scale.scale  # type: ignore[attr-defined]

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale changes by itself."""
        return self._zero.scale_guard.scale.is_dynamic  # type: ignore[attr-defined]

    def get_data_types(self) -> tuple[Any, Any]:
        """Dtypes of the model and of gradient accumulation."""
        return self._config.precision_dtype, self._config.data_types.grad_accum_dtype or self._config.precision_dtype

    @property
    def communication_data_type(self) -> Any:
        """Dtype of gradients on the wire."""
        return self._config.communication_data_type or self.get_data_types()[1]


for _name, _path in _PATHS.items():
    if _name not in ConfigQueries.__dict__:
        setattr(ConfigQueries, _name, _query(_path))
