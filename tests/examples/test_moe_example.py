"""The examples with experts learn, alike at ZeRO stages 2 and 3."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.parallel.expert.models import LONG

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "moe"


def run_example(rank: int, world_size: int, name: str, arguments: list[str]) -> list[float]:
    spec = importlib.util.spec_from_file_location(f"moe_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=LONG), ["--residual", "--top-k", "2", "--noisy-gate-policy", "RSample"]]
)
def test_the_classifier_learns_the_same_at_zero_2_and_3(more: list[str]) -> None:
    two, three = (
        run_ranks(
            2, run_example, "train", ["--steps", "40", *more, "--deepspeed_config", str(FOLDER / f"zero{stage}.json")]
        )[0]
        for stage in (2, 3)
    )
    assert sum(two[-5:]) < 0.6 * sum(two[:5])
    assert three == pytest.approx(two, rel=1e-3)


def test_the_mixtral_learns() -> None:
    pytest.importorskip("transformers")
    losses = run_ranks(
        2, run_example, "hugging_face", ["--steps", "25", "--deepspeed_config", str(FOLDER / "expert_parallel.json")]
    )[0]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
