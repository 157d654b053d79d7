"""Keys that no field names: what is a comment, what is left out with a warning, what is an error."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfigError, load_config
from deepspeed.config.base import value_at
from deepspeed.config.root import Config
from deepspeed.config.schema import all_paths
from deepspeed.config.unknown import MEANS


@pytest.mark.parametrize(
    ("written", "warning"),
    [
        ({"qqqqqqq": 1}, "qqqqqqq has no effect: it is not a configuration key."),
        ({"stage": 2}, "stage has no effect: it belongs in zero_optimization.stage."),
        ({"fp16": {"gradient_clipping": 1}}, "fp16.gradient_clipping has no effect: it belongs in gradient_clipping."),
        ({"max_grad_norm": 1}, "max_grad_norm has no effect: use gradient_clipping."),
        ({"offload_optimizer": {"device": "cpu"}}, "it belongs in zero_optimization.offload_optimizer."),
        ({"prefetch_bucket_size": 1}, "it belongs in zero_optimization.prefetch_bucket_size."),
        ({"offload_optimzer": {}}, "nearest: zero_optimization.offload_optimizer"),
        ({"fp16": {"opt_level": "O2"}}, "fp16.opt_level has no effect: it is a setting of Apex"),
        ({"bf16": {"loss_scale": 0}}, "bf16.loss_scale has no effect: bf16 has fp32's range"),
        ({"bfloat16": {"hysteresis": 2}}, "bfloat16.hysteresis has no effect: bf16 has fp32's range"),
        ({"optimizer": {"type": "Adam", "adam_w_mode": True}}, "settings stand in optimizer.params"),
        ({"scheduler": {"type": "WarmupLR", "warmup_max_lr": 1}}, "settings stand in scheduler.params"),
        ({"checkpoint": {"save_optimizer_states": True}}, "checkpoint.save_optimizer_states has no effect"),
        ({"checkpoint": {"partition_activations": True}}, "it belongs in activation_checkpointing.partition_activations"),
        ({"flops_profiler": {"step": 1}}, "flops_profiler.step has no effect: use flops_profiler.profile_step."),
        ({"compile": {"backend": "inductor"}}, "engine.compile(backend=...)"),
        ({"gradient_accumulation_dtype": "fp32"}, "use data_types.grad_accum_dtype."),
    ],
)  # fmt: skip
def test_a_key_without_meaning_here_is_one_warning_that_says_where_its_meaning_lives(
    written: dict[str, Any], warning: str, warned: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        load_config(written)
    assert [warning in text for text in warned.messages] == [True]


def test_what_is_left_out_changes_nothing() -> None:
    assert load_config({"offload_optimizer": {"device": "cpu"}, "stage": 3}) == load_config({})


def test_comments_stand_at_any_depth(warned: pytest.LogCaptureFixture) -> None:
    config = load_config(
        {
            "_comment": "a run",
            "#flops_profiler": {"enabled": True},
            "zero_optimization": {"stage": 1, "_why": "small model", "#stage": 3},
            "optimizer": {"type": "Adam", "params": {"lr": 1, "#eps": 2, "_": 0}},
            "compression_training": {"row_pruning": {"shared_parameters": {}, "different_groups": {"_note": 1}}},
        }
    )
    assert value_at(config, "zero_optimization.stage") == 1
    assert config.optimizer is not None
    assert config.optimizer.params == {"lr": 1}
    assert warned.messages == []


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ({"gradient_acumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"train_micro_batch_size": 2}, "train_micro_batch_size_per_gpu"),
        ({"zero_force_ds_cpu_optimization": True}, "zero_force_ds_cpu_optimizer"),
        ({"bf16": {"enable": True}}, "bf16.enabled"),
        ({"checkpoint": {"tag_validaton": "Warn"}}, "checkpoint.tag_validation"),
        ({"zero_optimization": {"cpu_offload_params": True}}, "zero_optimization.cpu_offload_param"),
        ({"zero_optimization": {"stage3_param_persitence_threshold": 1}}, "stage3_param_persistence_threshold"),
        ({"optimizer": {"type": "Adam", "param": {}}}, "optimizer.params"),
    ],
)
def test_a_typo_is_an_error_with_the_nearest_key(written: dict[str, Any], nearest: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=f"Did you mean .*{nearest}"):
        load_config(written)


def test_a_stranger_in_a_strict_section_is_an_error() -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"zero_optimization\.find_unused_parameters is not"):
        load_config({"zero_optimization": {"find_unused_parameters": True}})


def test_the_users_dict_is_left_alone() -> None:
    written = {"qqqqqqq": 1, "_comment": 2, "zero_optimization": {"_why": 3}}
    load_config(written)
    assert written == {"qqqqqqq": 1, "_comment": 2, "zero_optimization": {"_why": 3}}


def test_no_key_of_the_table_is_a_configuration_key() -> None:
    assert set(MEANS) & set(all_paths(Config, aliases=True)) == set()


def test_a_key_of_another_program_is_told_where_its_meaning_lives(warned: Any) -> None:
    load_config({"mem_chunk": {"default_chunk_size": 1}, "eigenvalue": {"model_name": "bert"}})
    assert "zero_optimization.offload_param and offload_optimizer" in warned.messages[0]
    assert "eigenvalue.layer_name" in warned.messages[1]
