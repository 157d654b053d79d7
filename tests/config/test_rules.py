"""Keys that do not go together."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfigError, load_config
from tests.config.keys import nest

ZERO3 = {"stage": 3}


def compression(technique: str, shared: dict[str, Any], **groups: Any) -> dict[str, Any]:
    return nest(f"compression_training.{technique}", {"shared_parameters": shared, "different_groups": groups})


def random_ltd(**values: Any) -> dict[str, Any]:
    return nest("data_efficiency.data_routing.random_ltd", values)


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": values}


@pytest.mark.parametrize(
    ("written", "subject", "cure"),
    [
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "fp16.enabled = true and bf16.enabled = true: a model has one precision.",
            "Set one of them to false.",
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            "fp16.fp16_master_weights_and_grads = true and zero_optimization.stage = 0: this needs ZeRO.",
            "Use stage 1, 2 or 3",
        ),
        (
            {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "bf16.bf16_master_weights_and_grads = true and zero_optimization.stage = 0: this needs ZeRO.",
            "Use stage 1, 2 or 3",
        ),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states = true", "as well"),
        ({"amp": {"enabled": True}, "fp16": {"enabled": True}}, "a model has one precision", "to false"),
        ({"amp": {"enabled": True}, **zero(stage=1)}, "Apex excludes ZeRO", "bf16 or fp16"),
        (
            {"data_types": {"param_dtype": "fp16"}, "bf16": {"enabled": True}},
            'data_types.param_dtype = "fp16" and fp16.enabled = false and bf16.enabled = true: the model is bf16.',
            "Remove param_dtype",
        ),
        (
            {"gradient_allreduce_op": "sum", **zero(stage=3)},
            'gradient_allreduce_op = "sum" and zero_optimization.stage = 3',
            'Use "mean"',
        ),
        (
            {"optimizer": {"type": "ZeroOneAdam"}, **zero(stage=1, zero_quantized_gradients=True)},
            "averages whole momenta",
            "each compresses what is sent",
        ),
        ({"gradient_allreduce_op": "sum", "compile": {"deepcompile": True}}, "compile.deepcompile = true", '"mean"'),
        ({"gradient_allreduce_op": "sum", **zero(zenflow={})}, "zero_optimization.zenflow = ", '"mean"'),
        (zero(compute_grad_norm=False, stage=2), "gradient_clipping = 1.0: clipping needs the norm", "gradient_clipping to 0"),
        ({"gradient_clipping": 0, **zero(compute_grad_norm=False)}, "at stages 1 and 2 only", "Remove compute_grad_norm"),
        ({"managed_gradient_accumulation": False, "amp": {"enabled": True}}, "amp.enabled", "managed_gradient"),
        ({"managed_gradient_accumulation": False, "compile": {"deepcompile": True}}, "compile.deepcompile", "false"),
        ({"managed_gradient_accumulation": False, **zero(overlap_comm=True)}, "zero_optimization.overlap_comm", "false"),
        (zero(legacy_stage1=True), "zero_optimization.legacy_stage1 = true", "Remove the key"),
        (zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/x"}), "this needs ZeRO stage 3", "Set stage to 3"),
        (zero(stage=2, offload_optimizer={"ratio": 0.5}), "zero_optimization.offload_optimizer.ratio = 0.5 and zero", "stage to 3"),
        (zero(stage=2, offload_optimizer={"super_offload": True}), "offload_optimizer.super_offload = true", "stage to 3"),
        (zero(stage=3, offload_param={"device": "nvme"}), "offload_param.nvme_path = null", "Set nvme_path"),
        (zero(zenflow={"select_interval": 3}), 'select_strategy = "auto"', "Leave select_interval out"),
        (zero(zenflow={"select_strategy": "epoch"}), 'select_interval = "auto"', "give a number"),
        (
            zero(zenflow={"select_strategy": "step", "select_interval": 2, "update_interval": 4}),
            "zero_optimization.zenflow.update_interval = 4 and zero_optimization.zenflow.select_interval = 2",
            "at most 2",
        ),
        ({"optimizer": {"type": "Lamb"}, "fp16": {"enabled": True, "loss_scale": 8}}, "LAMB needs", "loss_scale to 0"),
        ({"optimizer": {"type": "OneBitLamb"}, **zero(stage=2)}, 'optimizer.type = "OneBitLamb"', "Set stage to 0 or 1"),
        (
            {"optimizer": {"type": "OneBitAdam"}, **zero(stage=1, offload_optimizer={"device": "cpu"})},
            "averages whole momenta",
            "Leave the state",
        ),
        (
            {"optimizer": {"type": "OneBitAdam"}, "gradient_allreduce_op": "sum"},
            "averages whole momenta",
            'Use "mean"',
        ),
        (
            {
                "optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 50}},
                "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 50}},
            },
            "nothing would ever be compressed",
            "Set freeze_step to a fifth",
        ),
        ({"expert_parallel": {"num_expert_groups": 2, "num_limited_groups": 4}}, "cannot visit more groups", "at most"),
        ({"expert_parallel": {"num_expert_groups": 2}}, "the two go together", "or neither"),
        ({"expert_parallel": {"comm_backend": "deepep"}}, "comm_max_tokens_per_rank = 0", "above 0"),
        ({"expert_parallel": {"router_pattern": "a.b"}}, 'router_pattern = "a.b"', "without dots"),
        ({"elasticity": {"enabled": True}}, "max_train_batch_size must be given too", "Set max_train_batch_size"),
        (
            {
                "train_batch_size": 8,
                "elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [2]},
            },
            "elasticity.enabled = true and train_batch_size = 8",
            "Remove train_batch_size",
        ),
        ({"elasticity": {"min_gpus": 4, "max_gpus": 2}}, "the wrong way round", "Exchange"),
        ({"elasticity": {"version": 0.3}}, "elasticity.version = 0.3: there is no such version", "0.1 or 0.2"),
        ({"elasticity": {"version": 0.1, "model_parallel_size": 2}}, "needs version 0.2", "Set version to 0.2"),
        (
            nest("data_efficiency.data_sampling.curriculum_learning.enabled", True),
            "a curriculum needs a metric",
            "curriculum_metrics",
        ),
        (nest("data_efficiency.data_sampling.dynamic_batching.enabled", True), "need max_tokens", "Set max_tokens"),
        (random_ltd(random_ltd_layer_num=2, random_ltd_layer_id=[1]), "1 layers are listed", "to 1"),
        ({"curriculum_learning": {"schedule_type": "fixed_linear"}}, "schedule_config.total_curriculum_step", "Set"),
        (
            {
                "curriculum_learning": {
                    "schedule_type": "fixed_discrete",
                    "schedule_config": {"difficulty": [1, 2], "max_step": [5, 6]},
                }
            },
            "curriculum_learning.schedule_config.max_step = [5, 6]: there is one difficulty more",
            "one longer",
        ),
        (compression("weight_quantization", {"enabled": True}), "no group of layers is given", "different_groups"),
        (compression("head_pruning", {"enabled": True}, g={"params": {"dense_ratio": 0.5}}), "num_heads", "Set num_heads"),
        (compression("sparse_pruning", {"enabled": True}, g={"params": {}}), "it must be given", "Set dense_ratio"),
        (
            compression("sparse_pruning", {"method": "snip_momentum", "schedule_offset": 9, "schedule_offset_end": 3}),
            "pruning would end before it starts",
            "at least 9",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_shows_the_keys_the_rule_and_the_cure(written: dict[str, Any], subject: str, cure: str) -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config(written)
    assert subject in str(caught.value)
    assert cure in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        {"gradient_allreduce_op": "sum", **zero(stage=2)},
        {"gradient_clipping": 0, **zero(stage=1, compute_grad_norm=False)},
        {"managed_gradient_accumulation": False, **zero(stage=2, overlap_comm=True)},
        {"data_types": {"param_dtype": "bf16"}, "bf16": {"enabled": True}},
        {"optimizer": {"type": "Lamb"}, "fp16": {"enabled": True}},
        {"optimizer": {"type": "OneBitAdam"}},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}, **zero(stage=1)},
        zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/local_nvme"}),
        compression("sparse_pruning", {"enabled": True, "method": "snip_momentum"}),
        compression("row_pruning", {"enabled": True}, g={"params": {"dense_ratio": 0.5}, "modules": ["mlp"]}),
        {
            "train_batch_size": 8,
            "elasticity": {
                "enabled": True,
                "max_train_batch_size": 8,
                "micro_batch_sizes": [2],
                "ignore_non_elastic_batch_info": True,
            },
        },
        {"expert_parallel": {"num_expert_groups": 4, "num_limited_groups": 2}},
    ],
)  # fmt: skip
def test_keys_that_go_together_are_accepted(written: dict[str, Any]) -> None:
    load_config(written)
