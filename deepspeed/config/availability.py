"""What the configuration can ask for and this version does not have yet.

`check_available` is called by the engine before it builds anything. A section that is present but off is fine.

The idea: one table from the place in the configuration to the feature's name. Building a feature ends with deleting its
lines here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.config.base import value_at
from deepspeed.config.explain import show
from deepspeed.config.root import ONE_BIT_OPTIMIZERS, Config
from deepspeed.utils.errors import NotAvailableError


def _is_given(value: Any) -> bool:
    return value is not None


def _is_above_1(value: float | None) -> bool:
    return value is not None and value > 1


def _is_missing_optimizer(name: str | None) -> bool:
    return (name or "").lower() in (*ONE_BIT_OPTIMIZERS, "muadam", "muadamw", "musgd")


_NOT_YET: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("zero_optimization.offload_optimizer.super_offload", bool, "offload for Superchips"),
    ("zero_optimization.zenflow", _is_given, "ZenFlow"),
    ("zero_optimization.zero_quantized_weights", bool, "quantized all-gathers"),
    ("zero_optimization.zero_quantized_nontrainable_weights", bool, "quantized frozen parameters"),
    ("zero_optimization.zero_quantized_gradients", bool, "quantized gradient reduction"),
    ("optimizer.type", _is_missing_optimizer, "this optimizer"),
    ("amp.enabled", bool, "Apex mixed precision"),
    ("msamp.enabled", bool, "MS-AMP"),
    ("sparse_gradients", bool, "sparse reduction of embedding gradients"),
    ("sequence_parallel_size", _is_above_1, "sequence parallelism"),
    ("tensor_parallel.autotp_size", _is_above_1, "automatic tensor parallelism"),
    ("expert_parallel.enabled", bool, "automatic expert parallelism"),
    ("compile.deepcompile", bool, "DeepCompile"),
    ("graph_harvesting", bool, "CUDA graphs of the step"),
    ("hybrid_engine.enabled", bool, "the hybrid engine"),
    ("weight_quantization.quantized_initialization", _is_given, "quantized weights"),
    ("weight_quantization.post_init_quant", bool, "quantized weights"),
    ("aio.use_gds", bool, "GPUDirect Storage"),
    ("autotuning.enabled", bool, "autotuning"),
    ("elasticity.enabled", bool, "elastic batch sizes"),
    ("data_efficiency.enabled", bool, "data efficiency"),
    ("curriculum_learning.enabled", bool, "curriculum learning"),
    ("progressive_layer_drop.enabled", bool, "progressive layer dropping"),
    ("compression_training.layer_reduction.enabled", bool, "layer reduction"),
    ("compression_training.weight_quantization.enabled", bool, "weight quantization while training"),
    ("compression_training.activation_quantization.enabled", bool, "activation quantization while training"),
    ("compression_training.sparse_pruning.enabled", bool, "pruning"),
    ("compression_training.row_pruning.enabled", bool, "pruning"),
    ("compression_training.head_pruning.enabled", bool, "pruning"),
    ("compression_training.channel_pruning.enabled", bool, "pruning"),
    ("quantize_training.enabled", bool, "quantization while training"),
    ("quantize_training.eigenvalue.enabled", bool, "layer curvature"),
    ("eigenvalue.enabled", bool, "layer curvature"),
    ("sparse_attention", _is_given, "sparse attention"),
)
"""The key, when its value asks for the feature, and the feature."""


def check_available(config: Config) -> None:
    """Raise NotAvailableError, naming every key that asks for a feature this version does not have yet."""
    missing = [
        f"{path} = {show(value)} is not available yet: {feature}."
        for path, is_asked, feature in _NOT_YET
        if is_asked(value := value_at(config, path))
    ]
    if missing:
        keys = "these keys" if len(missing) > 1 else "this key"
        raise NotAvailableError("\n".join([*missing, f"  Remove {keys}, or switch the feature off, to train without."]))
