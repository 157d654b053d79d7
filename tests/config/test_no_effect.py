"""The three tables of `availability.py`: every field is read somewhere, or stands in one of them; and what they say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspeed.config import Config, check_available, load_config
from deepspeed.config.base import Section
from deepspeed.config.refused_or_ignored import (
    NO_EFFECT,
    NOT_YET,
    SETTINGS_OF,
    TOGETHER,
    as_markdown,
    given_without_effect,
)
from deepspeed.config.schema import all_paths, field_of, inner_section
from tests.config.keys import KEYS, nest

ROOT = Path(__file__).resolve().parents[2]

CHECKED_ONLY = {
    "data_types.param_dtype": "a statement: an error where it is not so",
    "zero_optimization.legacy_stage1": "an error where it is true",
    "expert_parallel.load_balance_coeff": "an error where it is not null",
    "vocabulary_size": "a warning where it is no multiple of 8",
    "elasticity.ignore_non_elastic_batch_info": "an error where it is false and batch sizes are given",
}
WARNED_ELSEWHERE = ("checkpoint.writer.", "nebula.", "datastates_ckpt.")
"""Sections whose keys without effect `engine/checkpoints.py` names in one warning."""


def attributes_read(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr


def read_somewhere() -> set[str]:
    """Attributes that the package reads, outside config/ and in what config/ computes for others."""
    package = ROOT / "deepspeed"
    outside = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    computed = [package / "config" / name for name in ("elastic.py", "batch.py")]
    return {name for path in (*outside, *computed) for name in attributes_read(path.read_text())}


def is_setting_of_a_later_feature(path: str) -> bool:
    heads = {row[0].removesuffix(".enabled") for row in NOT_YET if row[0].endswith(".enabled")} | set(SETTINGS_OF)
    return path in {row[0] for row in NOT_YET} | heads or any(path.startswith(f"{head}.") for head in heads)


def test_every_field_is_read_or_stands_in_a_table() -> None:
    read = read_somewhere()
    unread = [
        path
        for path in all_paths(Config)
        if path.rpartition(".")[2] not in read
        and not is_setting_of_a_later_feature(path)
        and not any(path == key or path.startswith(f"{key}.") for key in NO_EFFECT)
        and not any(other.startswith(f"{path}.") for other in all_paths(Config))
        and path not in CHECKED_ONLY
        and not path.startswith(WARNED_ELSEWHERE)
    ]
    assert unread == []


def test_every_row_is_about_a_key() -> None:
    paths = set(all_paths(Config))
    assert set(NO_EFFECT) - paths == set()
    assert {key for row in TOGETHER for key in row.keys} - paths == set()


def other_value(path: str) -> Any:
    """A value of a key that is not its default."""
    section: type[Section] = Config
    for name in path.split(".")[:-1]:
        field = field_of(section, name)
        assert field is not None
        section = inner_section(field.annotation) or section
    default = KEYS.get(path)
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2
    if isinstance(default, int):
        return default + 1
    special = {
        "torch_autocast.lower_precision_safe_modules": ["torch.nn.Linear"],
        "pipeline": {"stages": 2},
        "expert_parallel.score_func": "sigmoid",
        "expert_parallel.score_apply": "pre",
        "expert_parallel.combine_impl": "legacy_bmm",
        "expert_parallel.row_weighting_impl": "eager",
        "expert_parallel.gate_up_impl": "fused",
        "expert_parallel.has_shared_experts": True,
    }
    if path.startswith("autotuning.model_info."):
        return 7
    return special.get(path, "given")


WITH = {
    "zero_optimization.compute_grad_norm": {"gradient_clipping": 0, "zero_optimization": {"stage": 1}},
    "bf16.bf16_optimizer_states": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
        "zero_optimization": {"stage": 1},
    },
}
"""What else some keys need."""


def merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(left[key], right[key]) for key in left.keys() & right.keys()}
    return {**left, **right, **both}


@pytest.mark.parametrize("path", NO_EFFECT)
def test_a_key_without_effect_is_one_warning_by_name_with_the_reason(
    path: str, warned: pytest.LogCaptureFixture
) -> None:
    config = load_config(merged(WITH.get(path, {}), nest(path, other_value(path))))
    warned.clear()
    for _ in range(2):
        check_available(config)
    assert len(warned.messages) == 1
    assert warned.messages[0].startswith(f"{path} = ")
    assert f" has no effect: {NO_EFFECT[path]}." in warned.messages[0]


def test_a_default_that_is_written_down_is_no_reason_to_warn() -> None:
    written = {"zero_optimization": {"contiguous_gradients": True, "allgather_bucket_size": 5e8}, "pipeline": {}}
    assert given_without_effect(load_config(written)) == []
    assert given_without_effect(load_config({})) == []


def test_the_tables_are_printed_in_the_docs() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == as_markdown()
