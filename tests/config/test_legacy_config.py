from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepspeed.config import DeepSpeedConfigError, load_config
from deepspeed.config import legacy_config as under_test
from deepspeed.config.legacy_config import _ATTRIBUTES, DeepSpeedConfig, data_parallel_size

WRITTEN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "steps_per_print": 10,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_batch_size", 6),
        ("train_micro_batch_size_per_gpu", 2),
        ("gradient_accumulation_steps", 3),
        ("world_size", 1),
        ("zero_enabled", True),
        ("zero_optimization_stage", 2),
        ("fp16_enabled", False),
        ("bfloat16_enabled", True),
        ("gradient_clipping", 0.5),
        ("steps_per_print", 10),
        ("optimizer_name", "adamw"),
        ("optimizer_params", {"lr": 1e-4}),
        ("scheduler_name", "WarmupLR"),
        ("scheduler_params", {}),
        ("grad_accum_dtype", torch.float32),
        ("initial_dynamic_scale", 65536),
        ("load_universal_checkpoint", False),
        ("dump_state", False),
        ("_param_dict", WRITTEN),
    ],
)
def test_an_attribute_of_the_original_has_its_value(name: str, value: Any) -> None:
    assert getattr(DeepSpeedConfig(WRITTEN), name) == value


@pytest.mark.parametrize("name", _ATTRIBUTES)
@pytest.mark.parametrize("written", [WRITTEN, {"train_batch_size": 1}], ids=["full", "bare"])
def test_every_line_of_the_table_reads(name: str, written: dict[str, Any]) -> None:
    getattr(DeepSpeedConfig(written), name)


def test_the_callers_dict_is_kept_as_it_is() -> None:
    assert DeepSpeedConfig(WRITTEN)._param_dict is WRITTEN


def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(WRITTEN))
    assert DeepSpeedConfig(str(path))._param_dict == WRITTEN


def test_an_unknown_optimizer_keeps_its_spelling() -> None:
    assert DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "RMSprop"}}).optimizer_name == "RMSprop"


def test_an_unknown_attribute_says_which_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'zero_stage'.*top-level JSON keys"):
        DeepSpeedConfig(WRITTEN).zero_stage  # noqa: B018


def test_without_a_launcher_the_error_says_that_one_process_was_counted() -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"world size = 1 \(no launcher: one process\)"):
        DeepSpeedConfig({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})


@pytest.fixture
def six_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(under_test.dist, "get_world_size", lambda: 6)


def mesh() -> SimpleNamespace:
    return SimpleNamespace(get_group=lambda mesh_dim: SimpleNamespace(size=lambda: {"data_parallel": 3}[mesh_dim]))


@pytest.mark.usefixtures("six_ranks")
@pytest.mark.parametrize(
    ("written", "mpu", "mesh_device", "expected"),
    [
        ({}, None, None, (6, "torch.distributed")),
        ({}, SimpleNamespace(get_data_parallel_world_size=lambda: 2), None, (2, "mpu")),
        (
            {},
            SimpleNamespace(get_sequence_parallel_world_size=lambda: 3),
            None,
            (2, "torch.distributed, 6 ranks / 3 per sequence by mpu"),
        ),
        (
            {"sequence_parallel_size": 2},
            None,
            None,
            (3, "torch.distributed, 6 ranks / 2 per sequence by sequence_parallel_size"),
        ),
        ({}, None, mesh(), (3, "mesh")),
    ],
)
def test_the_data_parallel_ranks_are_counted_by(
    written: dict[str, Any], mpu: Any, mesh_device: Any, expected: tuple[int, str]
) -> None:
    assert data_parallel_size(load_config(written), mpu, mesh_device) == expected


@pytest.mark.usefixtures("six_ranks")
def test_ranks_that_cannot_be_shared_out_over_sequences_are_refused() -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"sequence_parallel_size = 4.*6 ranks .* cannot be divided"):
        data_parallel_size(load_config({"sequence_parallel_size": 4}))
