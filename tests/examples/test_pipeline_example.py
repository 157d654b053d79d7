"""The pipeline example learns, as a GPT with a tied head and as AlexNet from live modules, whatever the schedule."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pipeline" / "train.py"


def run_example(rank: int, world_size: int, arguments: list[str]) -> list[float]:
    spec = importlib.util.spec_from_file_location("pipeline_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses: list[float] = module.main(arguments)
    return losses


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "gpt", "--zero", "2", "--schedule", "generated"],
        ["--model", "alexnet", "--schedule", "zb-h1"],
    ],
)
def test_the_example_learns_and_two_stages_tell_one_loss(arguments: list[str]) -> None:
    first, second = run_ranks(2, run_example, ["--steps", "16", *arguments])
    assert first == second
    assert sum(first[-3:]) < 0.8 * sum(first[:3])
