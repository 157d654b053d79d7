"""The flat object that scripts and libraries know as `DeepSpeedConfig`.

Exported as `deepspeed.DeepSpeedConfig`; nothing inside the package uses it. It reads a `Config`, resolves the batch
sizes at once, as the original does, and answers the original's attribute names from one table. A name that is not in
the table is looked up as a top-level JSON key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from deepspeed.config.batch import ACCUMULATION, MICRO, TRAIN
from deepspeed.config.parse import Source, read_config
from deepspeed.config.root import Config, load_config
from deepspeed.utils.errors import DeepSpeedConfigError

_KNOWN_OPTIMIZERS = ("adam", "adamw", "lamb", "lion", "adagrad", "muon", "onebitadam", "zerooneadam", "onebitlamb")
"""Names the original reports in lower case; others keep their spelling."""


def _optimizer_name(config: Config) -> str | None:
    name = config.optimizer.type if config.optimizer else None
    return name.lower() if name and name.lower() in _KNOWN_OPTIMIZERS else name


_ATTRIBUTES: Mapping[str, Callable[[Config], Any]] = MappingProxyType(
    {
        "zero_config": lambda config: config.zero_optimization,
        "zero_enabled": lambda config: config.zero_optimization.stage > 0,
        "zero_optimization_stage": lambda config: config.zero_optimization.stage,
        "mics_shard_size": lambda config: config.zero_optimization.mics_shard_size,
        "mics_hierarchial_params_gather": lambda config: config.zero_optimization.mics_hierarchical_params_gather,
        "float16_config": lambda config: config.fp16,
        "bfloat16_config": lambda config: config.bf16,
        "fp16_enabled": lambda config: config.fp16.enabled,
        "fp16_auto_cast": lambda config: config.fp16.auto_cast,
        "fp16_master_weights_and_gradients": lambda config: config.fp16.fp16_master_weights_and_grads,
        "bfloat16_enabled": lambda config: config.bf16.enabled,
        "loss_scale": lambda config: config.fp16.loss_scale,
        "initial_dynamic_scale": lambda config: 2**config.fp16.initial_scale_power,
        "amp_enabled": lambda config: config.amp.enabled,
        "amp_params": lambda config: dict(config.amp.model_extra or {}),
        "grad_accum_dtype": lambda config: config.data_types.grad_accum_dtype,
        "torch_autocast_enabled": lambda config: config.torch_autocast.enabled,
        "torch_autocast_dtype": lambda config: config.torch_autocast.dtype,
        "optimizer_name": _optimizer_name,
        "optimizer_params": lambda config: config.optimizer.params if config.optimizer else None,
        "optimizer_legacy_fusion": lambda config: bool(config.optimizer and config.optimizer.legacy_fusion),
        "scheduler_name": lambda config: config.scheduler.type if config.scheduler else None,
        "scheduler_params": lambda config: config.scheduler.params if config.scheduler else None,
        "sparse_gradients_enabled": lambda config: config.sparse_gradients,
        "pld_enabled": lambda config: config.progressive_layer_drop.enabled,
        "pld_params": lambda config: config.progressive_layer_drop.model_dump(exclude={"enabled"}),
        "curriculum_enabled_legacy": lambda config: config.curriculum_learning.enabled,
        "eigenvalue_enabled": lambda config: config.eigenvalue.enabled,
        "elasticity_enabled": lambda config: config.elasticity.enabled,
        "data_efficiency_enabled": lambda config: config.data_efficiency.enabled,
        "data_efficiency_config": lambda config: config.data_efficiency,
        "aio_config": lambda config: config.aio,
        "activation_checkpointing_config": lambda config: config.activation_checkpointing,
        "autotuning_config": lambda config: config.autotuning,
        "checkpoint_config": lambda config: config.checkpoint,
        "load_universal_checkpoint": lambda config: config.checkpoint.load_universal,
        "use_node_local_storage": lambda config: config.checkpoint.use_node_local_storage,
        "comms_config": lambda config: config.comms_logger,
        "compile_config": lambda config: config.compile,
        "compression_config": lambda config: config.compression_training,
        "flops_profiler_config": lambda config: config.flops_profiler,
        "nebula_config": lambda config: config.nebula,
        "tensor_parallel_config": lambda config: config.tensor_parallel,
        "timers_config": lambda config: config.timers,
        "weight_quantization_config": lambda config: config.weight_quantization,
    }
)
"""The original's attribute names that are not JSON keys."""


def data_parallel_size(config: Config, mpu: Any = None, mesh_device: Any = None) -> tuple[int, str]:
    """How many data-parallel ranks there are, and who says so.

    In this order: a mesh's dim `data_parallel`; an `mpu`, the object a model-parallel script brings; the world size
    over `sequence_parallel_size`; the world size. Without torch.distributed the world is this process.
    """
    is_up = dist.is_available() and dist.is_initialized()
    world, source = (dist.get_world_size(), "torch.distributed") if is_up else (1, "no launcher: one process")
    if mesh_device is not None:
        return mesh_device.get_group(mesh_dim="data_parallel").size(), "mesh"
    if hasattr(mpu, "get_data_parallel_world_size"):
        return mpu.get_data_parallel_world_size(), "mpu"
    shared_by = (mpu.get_sequence_parallel_world_size() if mpu is not None else config.sequence_parallel_size) or 1
    if shared_by == 1:
        return world, source
    who = "mpu" if mpu is not None else "sequence_parallel_size"
    if world % shared_by:
        raise DeepSpeedConfigError(
            f"{who} = {shared_by} ranks per sequence, but {world} ranks ({source}) cannot be divided by that.\n"
            f"  Start a multiple of {shared_by} processes, or change the number."
        )
    return world // shared_by, f"{source}, {world} ranks / {shared_by} per sequence by {who}"


class DeepSpeedConfig:
    """A configuration read, checked and resolved for this world size, with the original's attribute names.

    `config` is a dict, a path or base64. Batch sizes are those computed. Raises DeepSpeedConfigError.
    """

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int

    def __init__(self, config: Source, mpu: Any = None, mesh_device: Any = None) -> None:
        self._param_dict: dict[str, Any] = config if isinstance(config, dict) else read_config(config)
        self._config = load_config(config)
        self.world_size, source = data_parallel_size(self._config, mpu, mesh_device)
        sizes = self._config.batch_sizes(data_parallel_size=self.world_size, size_source=source)
        for key, size in {TRAIN: sizes.train, MICRO: sizes.micro, ACCUMULATION: sizes.accumulation}.items():
            setattr(self, key, size)

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return _ATTRIBUTES[name](self._config)
        if name in Config.model_fields:
            return getattr(self._config, name)
        raise AttributeError(
            f"DeepSpeedConfig has no attribute {name!r}. Its names are the top-level JSON keys and those of the table "
            "in deepspeed.config.legacy_config."
        )
