"""A checkpoint of any ZeRO stage and world size loads into any other, bit for bit, and the run goes on from there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.checkpoint.runs import assert_same, resume, save_and_go_on
from tests.harness import run_ranks

BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "extra", [{}, BF16, {"fp16": {"enabled": True, "initial_scale_power": 4}}], ids=["fp32", "bf16", "fp16"]
)
def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path: Path, stage: int, extra: dict) -> None:
    expected = run_ranks(2, save_and_go_on, tmp_path, stage, **extra)
    actual = run_ranks(2, resume, tmp_path, stage, **extra)
    assert [ran.losses for ran in actual] == [ran.losses for ran in expected]
    assert_same(actual, expected)


@pytest.mark.parametrize("to", [0, 1, 2, 3])
@pytest.mark.parametrize(("come_from", "name"), [(0, "frozen"), (3, "unused"), (2, "gpt_tied")])
def test_stages_load_each_other(tmp_path: Path, come_from: int, to: int, name: str) -> None:
    expected = run_ranks(2, save_and_go_on, tmp_path, come_from, name)
    actual = run_ranks(2, resume, tmp_path, to, name)
    assert_same(actual, expected)
    assert actual[0].losses == expected[0].losses


@pytest.mark.quick("3-4", "2-3", "4-1")
@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 3), (3, 4), (4, 1), (2, 3), (3, 2)])
def test_world_sizes_load_each_other(tmp_path: Path, before: int, after: int) -> None:
    stages = (3, 1) if before > after else (2, 3)
    expected = run_ranks(before, save_and_go_on, tmp_path, stages[0])
    actual = run_ranks(after, resume, tmp_path, stages[1])
    assert_same(actual, expected)
    means = [sum(ran.losses[-1] for ran in rans) / len(rans) for rans in (actual, expected)]
    assert math.isclose(*means, rel_tol=1e-5)


def test_precisions_load_each_other(tmp_path: Path) -> None:
    expected = run_ranks(2, save_and_go_on, tmp_path, 2, **BF16)
    actual = run_ranks(2, resume, tmp_path, 3)
    assert_same(actual, expected)
    assert all(tensor.dtype == torch.float32 for tensor in actual[0].weights.values())
