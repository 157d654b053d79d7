"""Dictionaries that other libraries send, as they send them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from deepspeed.config import check_available, load_config

FROM_ACCELERATE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": float("inf"),
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 0,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "fp16": {"enabled": False, "auto_cast": True},
    "bf16": {"enabled": False},
    "communication_data_type": "fp32",
}

FROM_TRANSFORMERS: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}

FROM_TRL: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "zero_optimization.reduce_bucket_size": 768 * 768,
    "zero_optimization.stage3_param_persistence_threshold": 7680,
    "zero_optimization.stage3_prefetch_bucket_size": 0.9 * 768 * 768,
}

FROM_LIGHTNING: dict[str, Any] = {
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "synchronize_checkpoint_boundary": False,
    },
    "aio": {
        "block_size": 1048576,
        "queue_depth": 8,
        "single_submit": False,
        "overlap_events": True,
        "thread_count": 1,
    },
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_bucket_size": 200_000_000,
        "sub_group_size": 1_000_000_000_000,
    },
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
}

ALL = {
    "accelerate": FROM_ACCELERATE,
    "transformers": FROM_TRANSFORMERS,
    "trl": FROM_TRL,
    "lightning": FROM_LIGHTNING,
}


@pytest.mark.parametrize("sender", ALL)
def test_what_a_library_sends_is_accepted_and_left_as_it_is(sender: str) -> None:
    before = copy.deepcopy(ALL[sender])
    check_available(load_config(ALL[sender]))
    assert ALL[sender] == before


def test_accelerate_may_ask_for_ms_amp() -> None:
    assert load_config({"msamp": {"enabled": True, "opt_level": "O2"}}).msamp.opt_level == "O2"


def test_trl_sets_keys_by_dotted_names() -> None:
    zero = load_config(FROM_TRL).zero_optimization
    assert (zero.stage, zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size) == (3, 589824, 530841)


def test_the_default_of_gradient_clipping_is_on() -> None:
    assert load_config({}).gradient_clipping == 1.0
    assert load_config(FROM_LIGHTNING).gradient_clipping == 0.0
