"""What a value may look like, and what it becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed.config import load_config
from deepspeed.config.base import value_at
from deepspeed.utils.logging import logger, warn_once
from tests.config.keys import nest


@pytest.mark.parametrize(
    ("path", "written", "read"),
    [
        ("zero_optimization.reduce_bucket_size", 5e8, 500_000_000),
        ("zero_optimization.reduce_bucket_size", "5e8", 500_000_000),
        ("zero_optimization.reduce_bucket_size", 15099494.4, 15099494),
        ("zero_optimization.stage3_prefetch_bucket_size", "943718.4", 943718),
        ("zero_optimization.sub_group_size", 1e12, 10**12),
        ("zero_optimization.stage3_max_live_parameters", 1e30, int(1e30)),
        ("zero_optimization.stage", "3", 3),
        ("zero_optimization.stage", 2.0, 2),
        ("train_batch_size", "8", 8),
        ("gradient_clipping", "0.5", 0.5),
        ("gradient_clipping", 0, 0.0),
        ("steps_per_print", float("inf"), None),
        ("steps_per_print", "inf", None),
        ("steps_per_print", 0, None),
        ("steps_per_print", 2000.0, 2000),
        ("fp16.enabled", "true", True),
        ("fp16.enabled", 1, True),
        ("fp16.enabled", "False", False),
        ("fp16.loss_scale", "128", 128.0),
        ("communication_data_type", "fp32", torch.float32),
        ("communication_data_type", "torch.bfloat16", torch.bfloat16),
        ("data_types.grad_accum_dtype", "float16", torch.float16),
        ("torch_autocast.dtype", "half", torch.float16),
        ("tensor_parallel.dtype", "int8", torch.int8),
        ("data_types.keep_in_fp32_modules", ["norm"], ("norm",)),
        ("data_types.keep_in_fp32_modules", "norm", ("norm",)),
        ("gradient_allreduce_op", "SUM", "sum"),
        ("checkpoint.tag_validation", "FAIL", "Fail"),
        ("checkpoint.writer", {"type": "FAST"}, {"type": "fast"}),
        ("log_level", "INFO", "info"),
        ("zero_optimization.leaf_module.names", "mlp", ("mlp",)),
        ("zero_optimization.leaf_module.classes", ["A", "B", "A"], ("A", "B")),
        ("datastates_ckpt", False, None),
        ("weight_quantization.quantized_initialization", {}, None),
        ("pipeline.custom", [1], [1]),
        ("optimizer.params", {"lr": "auto", "eps": 1e-8}, {"eps": 1e-8}),
        ("optimizer.params", None, {}),
        ("zero_optimization.zenflow", {"select_strategy": "step", "select_interval": 4}, {"select_interval": 4}),
    ],
)
def test_a_value_is_read_as(path: str, written: Any, read: Any) -> None:
    value = value_at(load_config(nest(path, written)), path)
    assert (
        value.model_dump(include=set(read)) if isinstance(read, dict) and not isinstance(value, dict) else value
    ) == read


@pytest.mark.parametrize(
    ("written", "path", "value"),
    [
        ({"zero_optimization": {"prefetch_bucket_size": 7}}, "zero_optimization.stage3_prefetch_bucket_size", 7),
        ({"zero_optimization": {"max_live_parameters": 7}}, "zero_optimization.stage3_max_live_parameters", 7),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "tensor_parallel.tensor_parallel.tp_size", 2),
        ({"tensor_parallel": {"kernel_inject": True}}, "tensor_parallel.replace_with_kernel_inject", True),
        (
            {"quantize_training": {"quantize-algo": {"rounding": "stochastic"}}},
            "quantize_training.quantize_algo.rounding",
            "stochastic",
        ),
        ({"aio": {"thread_count": 4}}, "aio.intra_op_parallelism", 4),
        ({"elasticity": {"prefer_large_batch": False}}, "elasticity.prefer_larger_batch", False),
        ({"zero_optimization.reduce_bucket_size": 7.5}, "zero_optimization.reduce_bucket_size", 7),
        ({"zero_optimization.offload_param.device": "cpu"}, "zero_optimization.offload_param.device", "cpu"),
        (
            {"zero_optimization.stage": 1, "zero_optimization": {"stage": 3}},
            "zero_optimization.stage",
            3,
        ),
        ({"zero_optimization": False}, "zero_optimization.stage", 0),
        ({"zero_optimization": True, "allgather_size": 9}, "zero_optimization.allgather_bucket_size", 9),
    ],
)
def test_another_spelling_means_the_same(written: dict[str, Any], path: str, value: Any) -> None:
    assert value_at(load_config(written), path) == value


@pytest.mark.parametrize(
    ("written", "path", "value", "warning"),
    [
        ({"cpu_offload": True}, "offload_optimizer.device", "cpu", "cpu_offload is an old"),
        ({"cpu_offload": False}, "offload_optimizer", None, "cpu_offload is an old"),
        ({"cpu_offload_param": "true", "stage": 3}, "offload_param.device", "cpu", "use offload_param"),
        ({"cpu_offload_use_pin_memory": True}, "offload_optimizer", None, "has no effect"),
        (
            {"stage3_gather_fp16_weights_on_model_save": True},
            "stage3_gather_16bit_weights_on_model_save",
            True,
            "use stage3_gather_16bit_weights_on_model_save",
        ),
    ],
)
def test_an_old_key_moves_to_the_new_one_with_one_warning(
    written: dict[str, Any], path: str, value: Any, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            config = load_config({"zero_optimization": written})
    finally:
        logger.removeHandler(caplog.handler)
    assert value_at(config.zero_optimization, path) == value
    assert [warning in text for text in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("written", "warning"),
    [
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "has no effect at stage 2"),
        ({"vocabulary_size": 50257}, "not a multiple of 8"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "use the top-level key gradient_clipping"),
        ({"zero_optimization": True}, 'write a section, {"stage": 0 to 3}'),
    ],
)
def test_what_is_allowed_and_probably_not_meant_warns(
    written: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        load_config(written)
    finally:
        logger.removeHandler(caplog.handler)
    assert [warning in text for text in caplog.messages] == [True]


def test_the_auto_keys_of_the_top_level_are_remembered() -> None:
    config = load_config({"gradient_clipping": "auto", "train_batch_size": "auto", "fp16": {"enabled": "auto"}})
    assert config.auto_keys == {"gradient_clipping", "train_batch_size"}
    assert config.gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ({}, torch.float32),
        ({"fp16": {"enabled": True}}, torch.float16),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"torch_autocast": {"enabled": True}}, torch.float32),
    ],
)
def test_the_precision_of_the_model(written: dict[str, Any], dtype: torch.dtype) -> None:
    assert load_config(written).precision_dtype is dtype


def test_expert_w3_tells_null_from_absent() -> None:
    assert "expert_w3" in load_config({"expert_parallel": {"expert_w3": None}}).expert_parallel.model_fields_set
    assert "expert_w3" not in load_config({"expert_parallel": {}}).expert_parallel.model_fields_set


def test_a_read_configuration_prints_as_json() -> None:
    text = load_config({"communication_data_type": "bf16", "aio": {}}).model_dump_json()
    assert '"communication_data_type":"bf16"' in text
