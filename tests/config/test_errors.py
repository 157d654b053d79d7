"""What a user reads when the configuration is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfigError, ZeroConfig, load_config, read_section


def message(written: dict[str, Any]) -> str:
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config(written)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "key", "cure"),
    [
        ({"gradient_clipp1ng": 1}, "gradient_clipp1ng", "Did you mean gradient_clipping?"),
        ({"zero_optimizaton": {}}, "zero_optimizaton", "Did you mean zero_optimization?"),
        ({"bfloat": {}}, "bfloat", "Did you mean bfloat16?"),
        (
            {"zero_optimization": {"reduce_bucket": 1}},
            "zero_optimization.reduce_bucket",
            "Did you mean zero_optimization.reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"prefetch_bucket": 1}},
            "zero_optimization.prefetch_bucket",
            "Did you mean zero_optimization.prefetch_bucket_size?",
        ),
        (
            {"zero_optimization": {"offload_param": {"pin_memry": True}}},
            "zero_optimization.offload_param.pin_memry",
            "Did you mean zero_optimization.offload_param.pin_memory?",
        ),
        ({"zero_optimization.stag": 1}, "zero_optimization.stag", "Did you mean zero_optimization.stage?"),
        ({"wandb": {"xyz": 1}}, "wandb.xyz", "Its keys are enabled, group, team, project."),
        ({"zero_optimization": {"qqqqqqq": 1}}, "zero_optimization.qqqqqqq", "Remove it."),
        ({"optimizer": {"typ": "Adam"}}, "optimizer.typ", "Did you mean optimizer.type?"),
        ({"aio": {"blocksize": 1}}, "aio.blocksize", "Did you mean aio.block_size?"),
        (
            {"activation_checkpointing": {"profil": True}},
            "activation_checkpointing.profil",
            "Did you mean activation_checkpointing.profile?",
        ),
        ({"timers": {"throughput": {"enable": 1}}}, "timers.throughput.enable", "timers.throughput.enabled?"),
        (
            {
                "data_efficiency": {
                    "data_sampling": {"curriculum_learning": {"curriculum_metrics": {"length": {"schedule_typ": 1}}}}
                }
            },
            "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.length.schedule_typ",
            "curriculum_metrics.length.schedule_type?",
        ),
        (
            {"tensor_parallel": {"partition_config": {"layer_specs": [{"patterns": "a", "partition_typ": "row"}]}}},
            "tensor_parallel.partition_config.layer_specs[0].partition_typ",
            "tensor_parallel.partition_config.layer_specs[0].partition_type?",
        ),
        (
            {
                "compression_training": {
                    "row_pruning": {"shared_parameters": {}, "different_groups": {"g": {"params": {"dense_ratios": 1}}}}
                }
            },
            "compression_training.row_pruning.different_groups.g.params.dense_ratios",
            "compression_training.row_pruning.different_groups.g.params.dense_ratio?",
        ),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_valid_one(
    written: dict[str, Any], key: str, cure: str
) -> None:
    subject, advice = message(written).splitlines()
    assert subject == f"{key} is not a configuration key."
    assert advice.endswith(cure)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage = 5 is too large.\n  It must be at most 3 (default 0)."),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            'zero_optimization.offload_param.device = "disk" is not one of its values.\n'
            '  Use "none", "cpu" or "nvme" (default "none").',
        ),
        ({"train_batch_size": "eight"}, 'train_batch_size = "eight" is not a whole number.\n  Use a whole number.'),
        ({"train_batch_size": 2.5}, "train_batch_size = 2.5 is not a whole number.\n  Use a whole number."),
        ({"gradient_clipping": None}, "gradient_clipping = null is not a number.\n  Use a number (default 1.0)."),
        ({"gradient_clipping": -1}, "gradient_clipping = -1 is too small.\n  It must be at least 0 (default 1.0)."),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size = 0 is too small.\n  It must be at least 1 (default 500000000)."),
        (
            {"zero_optimization": {"zenflow": {"topk_ratio": 1}}},
            "zero_optimization.zenflow.topk_ratio = 1 is too large.\n  It must be less than 1 (default 0.1).",
        ),
        ({"fp16": {"enabled": "maybe"}}, 'fp16.enabled = "maybe" is neither true nor false.\n  Use true or false (default false).'),
        ({"optimizer": "adam"}, 'optimizer = "adam" is not a section.\n  Write a section, {...}, or remove the key.'),
        ({"zero_optimization": {"offload_param": 3}}, "zero_optimization.offload_param = 3 is not a section.\n  Write a section, {...}, or remove the key."),
        ({"scheduler": {"params": [1]}}, "scheduler.params = [1] is not a section.\n  Write a section, {...}, or remove the key."),
        (
            {"communication_data_type": "int8"},
            'communication_data_type = "int8" is not a floating-point dtype.\n  Use fp32, fp16 or bf16.',
        ),
        (
            {"torch_autocast": {"dtype": "fp8"}},
            'torch_autocast.dtype = "fp8" is not a dtype.\n'
            "  Use one of fp16, float16, half, fp32, float32, float, bf16, bfloat16, int8.",
        ),
        ({"data_types": {"keep_in_fp32_modules": 3}}, 'data_types.keep_in_fp32_modules = 3 is not a list.\n  Use a list (default "auto").'),
        ({"expert_parallel": {"load_balance_coeff": 0.1}}, "expert_parallel.load_balance_coeff = 0.1 is not null.\n  Remove the key."),
        ({"expert_parallel": {"async_split_plan": 1}}, "expert_parallel.async_split_plan = 1 is neither true nor false.\n  Use true or false (default false)."),
        ({"expert_parallel": {"validate_folding_routing": "yes"}}, 'expert_parallel.validate_folding_routing = "yes" is neither true nor false.\n  Use true or false (default false).'),
        ({"expert_parallel": {"top_k": "two"}}, 'expert_parallel.top_k = "two" is not a whole number.\n  Use a whole number (default "auto").'),
        ({"checkpoint": {"tag_validation": "MAYBE"}}, 'checkpoint.tag_validation = "MAYBE" is not one of its values.\n  Use "Ignore", "Warn" or "Fail" (default "Warn").'),
        ({"checkpoint": {"parallel_write": {"pipeline_stage": "x"}}}, 'checkpoint.parallel_write.pipeline_stage = "x" is neither true nor false.\n  Use true or false (default false).'),
        ({"autotuning": {"results_dir": ""}}, 'autotuning.results_dir = "" is too short.\n  It needs at least 1 character(s) (default "autotuning_results").'),
        ({"compile": {"passes": ["z1", "z2"]}}, 'compile.passes[1] = "z2" is not one of its values.\n  Use "z1", "z3", "autosp" or "autotp".'),
        ({"zero_optimization": {"cpu_offload": "maybe"}}, 'zero_optimization.offload_optimizer = "maybe" is not a section.\n  Write a section, {...}, or remove the key.'),
        (
            {"compression_training": {"activation_quantization": {"shared_parameters": {}, "different_groups": {"g": {"params": {}}}}}},
            "compression_training.activation_quantization.different_groups.g.params.bits is missing.\n"
            "  compression_training.activation_quantization.different_groups.g.params needs it.",
        ),
        (
            {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
            "zero_optimization.prefetch_bucket_size and stage3_prefetch_bucket_size are the same setting, given twice.\n  Keep one.",
        ),
        (
            {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}},
            "bfloat16 and bf16 are the same setting, given twice.\n  Keep one.",
        ),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.cpu_offload is an old name of offload_optimizer, which is given too.\n  Keep the new one only.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_the_rule_and_the_cure(written: dict[str, Any], expected: str) -> None:
    assert message(written) == expected


def test_everything_wrong_is_reported_at_once() -> None:
    text = message(
        {
            "gradient_clipp1ng": 1,
            "fp16": {"enabled": True},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 7, "reduce_bucket": 1, "offload_optimizer": {"device": "nvme"}},
            "train_batch_size": "eight",
        }
    )
    assert text.startswith("6 things in the configuration are wrong.\n- ")
    for words in (
        "gradient_clipp1ng is not a configuration key",
        "a model has one precision",
        "zero_optimization.stage = 7",
        "zero_optimization.reduce_bucket is not",
        "needs a folder on that disk",
        'train_batch_size = "eight"',
    ):
        assert words in text


def test_a_rule_about_a_wrong_section_is_left_for_later() -> None:
    assert message({"amp": {"enabled": True}, "zero_optimization": {"stage": 1, "x": 1}}).count("\n") == 1
    assert message({"data_types": {"param_dtype": "bf16"}, "bfloat16": {"enabled": True, "x": 1}}).count("\n") == 1


def test_a_long_value_is_cut() -> None:
    assert len(message({"optimizer": "x" * 10_000})) < 300


def test_a_section_can_be_read_alone() -> None:
    assert read_section(ZeroConfig, {"stage": "2"}).stage == 2
    with pytest.raises(DeepSpeedConfigError, match=r"^in a plugin: stag is not a configuration key"):
        read_section(ZeroConfig, {"stag": 2}, "a plugin")


def test_the_error_can_be_caught_as_value_error_and_as_assertion_error() -> None:
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind):
            load_config({"wandb": {"nope": 1}})


def test_the_error_hides_no_other_error_behind_it() -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config({"wandb": {"nope": 1}})
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
